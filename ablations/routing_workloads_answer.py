"""What `routing_workloads` answers: each workload in figures, whether counts follow the closed form, and what placing
experts buys, at the largest size there is.

DeepSeek-V3 serves 256 experts from 32 ranks with a redundant one on each (arXiv:2412.19437 section 3.4.1): the full
profile has that size.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress

from ablations.evidence import Estimate, NoEvidence, Value, estimate, mean
from bench.record import Profile, Record
from bench.workload_sizes import FACTOR, LAYERS, SMALL_RANKS, SMALL_SLOTS

SEEDS: Mapping[Profile, int] = {"quick": 2, "full": 6}
BASELINE = "balanced"
BURSTS = "bursty"
CORRELATED, INDEPENDENT = "correlated_layers", "zipf"


Size = Mapping[str, Value]


def answer(records: Sequence[Record]) -> str:
    """Loads and drops of every workload, the closed forms, what layers have in common, and placement."""
    drawn = [row for row in records if row.metric == "excess_cv_squared" and row.error is None]
    if not drawn:
        raise NoEvidence("no workload has been drawn")
    largest = max(drawn, key=lambda row: int(row.axes["experts"])).axes
    size = {name: largest[name] for name in ("experts", "k")}
    arms = tuple(dict.fromkeys(row.arm for row in drawn))
    said = [f"At {size['experts']} experts, k={size['k']} and {largest['tokens']} tokens a step:"]
    for part in (_loads, _closed_forms, _layers, _placed, _unforeseen, _optimum):
        with suppress(NoEvidence):
            said.append(part(records, arms, size))
    return " ".join(said)


def _loads(records: Sequence[Record], arms: Sequence[str], size: Size) -> str:
    """How uneven each workload is in the mean over steps, bursty also at its worst, and what a capacity drops."""
    uneven = {arm: _over_steps(records, arm, "excess_cv_squared", "mean", size) for arm in arms}
    order = sorted(arms, key=lambda arm: uneven[arm].value)
    told = ", ".join(f"{arm} {uneven[arm].value:.3g}" for arm in order)
    burst = _over_steps(records, BURSTS, "excess_cv_squared", "worst", size)
    drops = {arm: _over_steps(records, arm, "drop_share", "mean", size).value for arm in order}
    dropped = ", ".join(f"{arm} {_percent(share)}" for arm, share in drops.items())
    chance = estimate(records, arm=BASELINE, metric="drop_floor", **size).value
    return (
        f"squared CV of a step's loads beyond chance's: {told}; {BURSTS} {burst.value:.3g} at its worst step. "
        f"Assignments dropped where experts have room for {FACTOR:g} mean loads: {dropped}; by chance "
        f"{_percent(chance)}."
    )


def _closed_forms(records: Sequence[Record], arms: Sequence[str], size: Size) -> str:
    """How near counts come to the expected loads: as chance has it, or exactly."""
    metric = "squared_load_deviation"
    found = {arm: estimate(records, arm=arm, metric=metric, layers=LAYERS, **size) for arm in arms}
    drawn = sorted((arm for arm in arms if found[arm].value > 0), key=lambda arm: found[arm].value)
    exact = " and ".join(f"{found[arm]} ({arm})" for arm in arms if found[arm].value == 0)
    if not drawn:
        raise NoEvidence("no workload that chance draws has been counted")
    least, most = drawn[0], drawn[-1]
    return (
        "The squared deviation of an expert's tokens from the closed form, which chance makes 1 in the mean, is "
        f"{found[least]} ({least}) to {found[most]} ({most}) binomial variances, and {exact}, whose counts are exact."
    )


def _layers(records: Sequence[Record], arms: Sequence[str], size: Size) -> str:
    """What neighbouring layers share where they are correlated and where not, and what ranks have of many layers."""
    shared, formula, apart = (
        estimate(records, arm=arm, metric=metric, apart=1, **size)
        for arm, metric in (
            (CORRELATED, "layer_overlap"),
            (CORRELATED, "layer_overlap_expected"),
            (INDEPENDENT, "layer_overlap"),
        )
    )
    together, averaged = (
        estimate(records, arm=arm, metric="rank_max_vio", layers=LAYERS, **size) for arm in (CORRELATED, INDEPENDENT)
    )
    return (
        f"Neighbouring layers of {CORRELATED} share {shared} experts of a token (closed form: {formula}), those of "
        f"{INDEPENDENT} {apart}: of {LAYERS} layers together MaxVio over ranks in order is {together} where all prefer "
        f"the same experts, and {averaged} where they do not."
    )


def _placed(records: Sequence[Record], arms: Sequence[str], size: Size) -> str:
    """The busiest rank of every workload in order, placed, and placed with redundant experts."""
    ranks, redundant = _ranks(records, size)
    in_order = {arm: _busiest(records, arm, "in_order", 0, size) for arm in arms}
    told = "; ".join(
        f"{arm} {in_order[arm].value:.3g}, {_busiest(records, arm, 'placed', 0, size).value:.3g}, "
        f"{_busiest(records, arm, 'placed', redundant, size).value:.3g}"
        for arm in sorted(arms, key=lambda arm: in_order[arm].value)
    )
    return (
        f"The busiest of {ranks} ranks has so many times the mean load with experts in their order, placed by past "
        f"loads, and placed by them with {redundant} redundant experts, one a rank as DeepSeek-V3 has in prefilling: "
        f"{told}. An expert that is there once stays whole, however it is placed."
    )


def _unforeseen(records: Sequence[Record], arms: Sequence[str], size: Size) -> str:
    """What knowing the step would gain over knowing the past, where that is most."""
    _, redundant = _ranks(records, size)
    placed, foreseen = (
        {arm: _busiest(records, arm, placing, redundant, size) for arm in arms} for placing in ("placed", "foreseen")
    )
    most = sorted(arms, key=lambda arm: placed[arm].value - foreseen[arm].value, reverse=True)[:2]
    told = " and ".join(f"{arm}, {foreseen[arm].value:.3g} instead of {placed[arm].value:.3g}" for arm in most)
    return f"With {redundant} redundant experts, knowing the step would gain most on these: {told}."


def _optimum(records: Sequence[Record], arms: Sequence[str], size: Size) -> str:
    """How near placement comes to the best, over all small cases."""
    metric = "placement_to_optimum"
    rows = [row for row in records if row.metric == metric and row.error is None]
    if not rows:
        raise NoEvidence("no placement has been held to the best")
    points = sorted({(row.arm, int(row.axes["experts"])) for row in rows})
    means = [
        estimate(records, arm=arm, metric=metric, experts=experts, over_steps="mean").value for arm, experts in points
    ]
    worst = max((row for row in rows if row.axes["over_steps"] == "worst"), key=lambda row: float(row.value or 0.0))
    return (
        f"On {SMALL_RANKS} ranks of {SMALL_SLOTS} slots, where all placements can be tried, the busiest rank has "
        f"{mean(means).value:.4g} times the load that it has under the best, in the mean over workloads, and "
        f"{worst.value:.4g} times at worst ({worst.axes['experts']} experts, {worst.arm})."
    )


def _ranks(records: Sequence[Record], size: Size) -> tuple[int, int]:
    """Ranks, and the redundant experts that they have room for."""
    placed = [row.axes for row in records if row.metric == "busiest_rank_load" and row.error is None]
    here = [axes for axes in placed if axes["experts"] == size["experts"]]
    if not here:
        raise NoEvidence("no expert has been placed")
    return int(here[0]["ranks"]), max(int(axes["redundant"]) for axes in here)


def _busiest(records: Sequence[Record], arm: str, placing: str, redundant: int, size: Size) -> Estimate:
    at: Size = {"placing": placing, "redundant": redundant, **size}
    return estimate(records, arm=arm, metric="busiest_rank_load", **at)


def _over_steps(records: Sequence[Record], arm: str, metric: str, over: str, size: Size) -> Estimate:
    return estimate(records, arm=arm, metric=metric, over_steps=over, **size)


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%"
