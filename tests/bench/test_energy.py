"""Energy on a card whose power is known: a stand-in for NVML over a clock that only the test moves."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from bench.measurement import Measurement
from bench.meters import energy as meter
from bench.meters.energy import Absent, energy

IDLE, BUSY, CALL, TICK = 100.0, 500.0, 0.03, 0.05  # watts, watts, seconds of a call, seconds between counter updates


class NVMLError(Exception):
    """As pynvml's."""


class NVMLErrorNotSupported(NVMLError):
    """As pynvml's."""


@dataclass
class FakeCard:
    """100 W idle, 500 W at work; the counter shows the energy of the last whole tick."""

    now: float = 0.0
    joules: float = 0.0
    shown: float = 0.0
    slowed: bool = False
    counts: bool = True

    def spend(self, seconds: float, watts: float) -> None:
        before = int(self.now / TICK)
        self.now += seconds
        self.joules += seconds * watts
        if int(self.now / TICK) > before and self.counts:
            self.shown = self.joules

    def nvml(self, fails: bool = False) -> Any:
        def init() -> None:
            if fails:
                raise NVMLError("driver not loaded")

        return SimpleNamespace(
            NVMLError=NVMLError,
            NVMLError_NotSupported=NVMLErrorNotSupported,
            NVML_CLOCK_SM=1,
            nvmlClocksEventReasonSwPowerCap=4,
            nvmlClocksEventReasonHwSlowdown=8,
            nvmlClocksEventReasonSwThermalSlowdown=32,
            nvmlClocksEventReasonHwThermalSlowdown=64,
            nvmlInit=init,
            nvmlShutdown=lambda: None,
            nvmlDeviceGetHandleByIndex=lambda index: index,
            nvmlDeviceGetTotalEnergyConsumption=lambda handle: int(self.shown * 1000),
            nvmlDeviceGetClockInfo=lambda handle, kind: 1980,
            nvmlDeviceGetCurrentClocksEventReasons=lambda handle: 64 if self.slowed else 1,
        )

    def measure(self, watts: float = BUSY, tokens: int = 10) -> tuple[Measurement, ...] | Absent:
        return energy(
            lambda: self.spend(CALL, watts),
            tokens=tokens,
            nvml=self.nvml(),
            now=lambda: self.now,
            sleep=lambda seconds: self.spend(seconds, IDLE),
        )


def test_energy_per_token_is_power_above_idle_times_time() -> None:
    figures = FakeCard().measure()
    assert not isinstance(figures, Absent)
    joules, clock = figures
    # (500 - 100) W x 0.03 s / 10 tokens; the counter's steps leave an error of one tick in forty.
    assert joules.value == pytest.approx((BUSY - IDLE) * CALL / 10, rel=TICK / 2.0 * 1.5)
    assert joules.n == 6
    assert joules.interval is not None
    assert clock.value == 1980


def test_a_window_that_slowed_down_does_not_count() -> None:
    absent = FakeCard(slowed=True).measure()
    assert isinstance(absent, Absent)
    assert "slowed down for heat or power in all 6 windows" in absent.reason


def test_a_counter_that_hardly_moves_gives_no_figure() -> None:
    absent = FakeCard(counts=False).measure()
    assert isinstance(absent, Absent)
    assert "fewer than 20 times" in absent.reason


def test_work_that_takes_no_more_than_idling_gives_no_figure() -> None:
    absent = FakeCard().measure(watts=IDLE / 2)
    assert isinstance(absent, Absent)
    assert "no more energy than idling" in absent.reason


def test_without_a_driver_there_is_one_line_that_says_so() -> None:
    absent = energy(lambda: None, tokens=1, nvml=FakeCard().nvml(fails=True))
    assert absent == Absent("NVML finds no driver: driver not loaded")


def test_without_the_package_the_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    absent = energy(lambda: None, tokens=1)
    assert isinstance(absent, Absent)
    assert "pip install nvidia-ml-py" in absent.reason
    assert meter.UPDATES == 20
