"""Energy per token and clocks of an NVIDIA GPU, through NVML; without one, a line that says why not.

    J/token = (counter at the end - at the start - idle power x length) / tokens of the window

The counter behind nvmlDeviceGetTotalEnergyConsumption moves every 20 to 100 ms and, on some cards, rests on samples of
a quarter of the time (arXiv 2312.02741). So a window lasts until the counter has moved 20 times and at least
`seconds`, several windows give the interval, idle power is measured first, and a window in which the card slowed down
for heat or power is dropped. Nothing is set, locked or reset: the card may be shared.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.interval import of_median
from bench.measurement import Measurement

UPDATES = 20
LONGEST = 10  # windows end unfinished after this many times `seconds`


@dataclass(frozen=True)
class Absent:
    """Why there is no figure."""

    reason: str


@dataclass(frozen=True)
class Window:
    """One stretch of work: joules of the counter and its moves, length, calls that fitted, SM clocks, slowed or not."""

    joules: float
    seconds: float
    updates: int
    calls: int
    clocks: tuple[int, ...]
    slowed: bool


def energy(
    call: Callable[[], object],
    *,
    tokens: int,
    seconds: float = 2.0,
    windows: int = 6,
    index: int = 0,
    nvml: Any = None,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Measurement, ...] | Absent:
    """Energy per token of `call`, which handles `tokens` of them and waits for the GPU, and the SM clock meanwhile.

    `nvml`, `now` and `sleep` are pynvml and the time unless given.
    """
    nvml = nvml or _pynvml()
    if isinstance(nvml, Absent):
        return nvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return Absent(f"NVML finds no driver: {error}")
    try:
        card = Card(nvml, nvml.nvmlDeviceGetHandleByIndex(index), now)
        idle = card.window(lambda: sleep(0.01), seconds)
        work = [card.window(call, seconds) for _ in range(windows)]
    except nvml.NVMLError as error:
        return Absent(f"this card does not tell its energy: {error}")
    finally:
        nvml.nvmlShutdown()
    return per_token(idle, work, tokens)


def per_token(idle: Window, work: list[Window], tokens: int) -> tuple[Measurement, ...] | Absent:
    """Energy per token above idle from windows of work, and the median clock; windows that slowed down do not count."""
    if min(window.updates for window in (idle, *work)) < UPDATES:
        return Absent(f"the energy counter moved fewer than {UPDATES} times in a window; lengthen the windows")
    steady = [window for window in work if not window.slowed]
    if not steady:
        return Absent(f"the card slowed down for heat or power in all {len(work)} windows")
    watts = idle.joules / idle.seconds
    joules = tuple((window.joules - watts * window.seconds) / (window.calls * tokens) for window in steady)
    if min(joules) <= 0.0:
        return Absent("work took no more energy than idling; is the call doing anything on this card?")
    clocks = [clock for window in steady for clock in window.clocks]
    return (
        Measurement(
            metric="energy_per_token",
            value=median(joules),
            n=len(joules),
            over="windows",
            samples=joules,
            interval=of_median(joules),
        ),
        Measurement(metric="sm_clock_mhz", value=median(clocks), n=len(clocks), over="calls"),
    )


class Card:
    """One GPU's sensors."""

    def __init__(self, nvml: Any, handle: Any, now: Callable[[], float]) -> None:
        self.nvml, self.handle, self.now = nvml, handle, now

    def window(self, call: Callable[[], object], seconds: float) -> Window:
        """Call until `seconds` are over and the counter has moved often enough, or for far too long."""
        start, first = self.now(), self._millijoules()
        last, updates, calls, slowed = first, 0, 0, False
        clocks = []
        while (self.now() - start < seconds or updates < UPDATES) and self.now() - start < LONGEST * seconds:
            call()
            calls += 1
            reading = self._millijoules()
            updates += reading != last
            last = reading
            clocks.append(self.nvml.nvmlDeviceGetClockInfo(self.handle, self.nvml.NVML_CLOCK_SM))
            slowed = slowed or self._slowed()
        return Window((last - first) / 1000, self.now() - start, updates, calls, tuple(clocks), slowed)

    def _millijoules(self) -> int:
        return int(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle))

    def _slowed(self) -> bool:
        nvml = self.nvml
        bad = (
            nvml.nvmlClocksEventReasonSwPowerCap
            | nvml.nvmlClocksEventReasonHwSlowdown
            | nvml.nvmlClocksEventReasonSwThermalSlowdown
            | nvml.nvmlClocksEventReasonHwThermalSlowdown
        )
        with suppress(nvml.NVMLError_NotSupported):
            return bool(nvml.nvmlDeviceGetCurrentClocksEventReasons(self.handle) & bad)
        return False


def _pynvml() -> Any:
    try:
        import pynvml
    except ImportError:
        return Absent("nvidia-ml-py is not installed; get it by: python -m pip install nvidia-ml-py")
    return pynvml
