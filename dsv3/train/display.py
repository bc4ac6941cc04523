"""What a run shows while it works: a progress line, and a line for each evaluation that stays."""

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dsv3.train.evaluate import Evaluation
from dsv3.train.step import StepReport

WEIGHT = 0.9  # of the past in the smoothed tokens/s


class Display:
    """A progress line on the error stream; where that is no terminal, the lines that stay are all there is."""

    def __init__(self, steps: int, *, shown: bool) -> None:
        self._console = Console(stderr=True, quiet=not shown, highlight=False)
        columns = (
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, disable=not (shown and self._console.is_terminal))
        self._task = self._bar.add_task("starting", total=steps)
        self._speed: float | None = None

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, report: StepReport) -> None:
        """Show a step."""
        speed = report.tokens / report.seconds
        self._speed = speed if self._speed is None else WEIGHT * self._speed + (1 - WEIGHT) * speed
        self._bar.update(self._task, completed=report.step, description=describe(report, self._speed))
        if report.health != "ok":
            self.say(f"step {report.step}: {report.health}")

    def evaluation(self, name: str, evaluation: Evaluation, baselines: Mapping[str, float]) -> None:
        """Show an evaluation beside the baselines on the same text."""
        domains = ", ".join(f"{domain} {value:.3f}" for domain, value in evaluation.by_domain.items())
        beside = "".join(f" | {baseline} {value:.3f}" for baseline, value in baselines.items())
        self.say(f"step {evaluation.step}: {name} {evaluation.bits_per_byte:.3f} bits per byte ({domains}){beside}")

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self._console.print(line, markup=False, soft_wrap=True)


def describe(report: StepReport, speed: float) -> str:
    """The numbers of the progress line.

    Loss, bits per byte, tokens per second, the worst layer's MaxVio, what was dropped.
    """
    parts = [f"loss {report.losses['total']:.3f}"]
    if report.bits_per_byte is not None:
        parts.append(f"{report.bits_per_byte:.3f} bits/byte")
    parts.append(f"{speed:,.0f} tokens/s")
    if report.max_vio:
        parts.append(f"MaxVio {max(report.max_vio):.2f}")
    if report.dropped:
        parts.append(f"dropped {report.dropped:.1%}")
    return "  ".join(parts)
