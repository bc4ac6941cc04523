"""What placing experts on ranks takes off the busiest rank, on loads that the placement has not seen.

At every step experts are placed by the loads of the `PAST` steps before it, and judged on the loads of the step itself:

    load of the busiest rank / mean load of a rank,   the mean of it over the steps

1 is perfect balance. `in_order` has expert e on rank e R / E, with none twice, whatever is spare; `placed` is
`dsv3.moe.placement` on the past; `foreseen` the same on the step itself, so that its distance from `placed` is what
drift and chance cost. On a dozen slots `to_optimum` holds it to the best placement of all. All of it is counted,
nothing is timed.
"""

from collections.abc import Iterable, Mapping
from statistics import fmean

import numpy as np
from jaxtyping import Float

from bench.routing_workloads import Workload, draw
from bench.workload_sizes import PAST, Ranks
from dsv3.config.rules import require
from dsv3.moe.placement import lower_bound, place, reference_largest_load

BASELINE = "in_order"
ROUNDING = 1e-9  # sums of quotients of counts


def busiest_rank(workload: Workload, shape: Ranks, redundant: int) -> Mapping[str, float]:
    """By way of placing: load of the busiest rank over the mean, with so many slots beside one for each expert.

    Raises:
        ValueError: slots that do not divide among the ranks.
        AssertionError: a placement that loses tokens, or is better than can be.
    """
    for name, slots in (("experts", shape.experts), ("experts + redundant", shape.experts + redundant)):
        rule = f"must be a multiple of ranks={shape.ranks}"
        require(slots % shape.ranks == 0, name, slots, rule, "give each rank as many")
    each = (shape.experts + redundant) // shape.ranks
    loads = [loads_of(workload, step) for step in range(PAST + shape.steps)]
    ratios: dict[str, list[float]] = {BASELINE: [], "placed": [], "foreseen": []}
    for step in range(PAST, len(loads)):
        now, past = loads[step], np.sum(loads[step - PAST : step], axis=0)
        mean = now.sum() / shape.ranks
        on_ranks = {BASELINE: now.reshape(shape.ranks, -1).sum(axis=1)}
        for name, known in (("placed", past), ("foreseen", now)):
            on_ranks[name] = place(known, ranks=shape.ranks, slots=each).rank_loads(now)
            _check(name, on_ranks[name], now, lower_bound(now, ranks=shape.ranks, slots=each))
        for name, busy in on_ranks.items():
            ratios[name].append(float(busy.max() / mean))
    return {name: fmean(values) for name, values in ratios.items()}


def to_optimum(workload: Workload, *, ranks: int, slots: int, steps: Iterable[int]) -> list[float]:
    """By step: the busiest rank under a placement that knows the step / under the best of all, which are tried: a dozen
    slots at most.

    Raises:
        ValueError: fewer slots, `slots` on each of the ranks, than experts.
        AssertionError: a placement that is better than the best.
    """
    ratios = []
    for step in steps:
        loads = loads_of(workload, step)
        best = reference_largest_load(loads, ranks=ranks, slots=slots)
        found = place(loads, ranks=ranks, slots=slots).largest
        assert found >= best * (1 - ROUNDING), f"the busiest rank has {found}, below the least {best}"
        ratios.append(max(1.0, found / best))
    return ratios


def loads_of(workload: Workload, step: int) -> Float[np.ndarray, " E"]:
    """The tokens of each expert at a step."""
    return np.bincount(draw(workload, step=step).indices.ravel(), minlength=workload.experts).astype(np.float64)


def _check(name: str, busy: np.ndarray, now: np.ndarray, least: float) -> None:
    lost = abs(busy.sum() - now.sum())
    assert lost <= ROUNDING * now.sum(), f"{name}: ranks have {busy.sum()} tokens of {now.sum()}"
    assert busy.max() >= least * (1 - ROUNDING), f"{name}: the busiest rank has {busy.max()}, below the least {least}"
