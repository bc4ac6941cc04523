"""Two language models compared when equal CPU time has passed, though the steps of one are longer.

    time of a look = steps * ratio        ratio: of a step's CPU time to dense attention's, measured by itself

Between looks the loss is read off a straight line.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ablations.evidence import Estimate, NoEvidence, estimate, mean, replicates
from bench.record import Record


def longest_rows(records: Sequence[Record]) -> list[Record]:
    """Those of the longest rows that dense attention was trained on: a quick run may lie beside a full one."""
    lengths = [int(row.axes["length"]) for row in records if row.arm == "dense" and row.axes.get("at") == "a look"]
    if not lengths:
        raise NoEvidence("dense attention was not trained")
    return [row for row in records if row.axes.get("length") == max(lengths)]


@dataclass(frozen=True, kw_only=True)
class Gap:
    """By how much two trailing losses differ after this share of dense attention's time."""

    nats: Estimate
    share: float

    @property
    def until(self) -> str:
        """Which share that is, in brackets, where it is not all of it."""
        return "" if self.share == 1 else f" ({self.share:.0%} of what dense attention took in all)"


def gap_at_equal_time(records: Sequence[Record], arm: str, baseline: str) -> Gap:
    """By how much the arms' trailing losses differ by seed when dense attention's time is over, or at the latest time
    that all trainings of both have reached: linear between looks.

    Raises:
        NoEvidence: no seed has both on one text, a step was not timed, or there is no dense attention whose time it is.
    """
    import numpy as np

    records = longest_rows(records)
    ours, theirs, dense = (_paths(records, name) for name in (arm, baseline, "dense"))
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        raise NoEvidence(f"no seed has looks of both {arm} and {baseline} on one text")
    whole = max(max(path) for path in dense.values())
    end = min(whole, *(max(paths[key]) for paths in (ours, theirs) for key in both))
    there = ([float(np.interp(end, [*paths[key]], [*paths[key].values()])) for key in both] for paths in (ours, theirs))
    return Gap(nats=mean([mine - other for mine, other in zip(*there, strict=True)]), share=end / whole)


def _paths(records: Sequence[Record], arm: str) -> dict[tuple[int, str], dict[float, float]]:
    """By seed and text, the trailing loss at each look, whose time is in steps of dense attention."""
    looks = [row for row in records if row.axes.get("at") == "a look"]
    ratio = 1.0 if arm == "dense" else estimate(records, arm=arm, metric="step_cpu_ratio").value
    paths: dict[tuple[int, str], dict[float, float]] = {}
    for step in sorted({int(row.axes["steps"]) for row in looks if row.arm == arm}):
        for seed, row in replicates(looks, arm=arm, metric="trailing_loss", steps=step).items():
            paths.setdefault((seed or 0, str(row.corpus)), {})[step * ratio] = float(row.value or 0.0)
    return paths
