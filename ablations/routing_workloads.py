"""What is each routing workload like, do its counts follow the closed form, and what does placing experts buy?

The workloads of `bench.routing_workloads` are the arms; a seed is a draw of all of them. Nothing is trained or timed.
A cell takes them at two sizes, 8 of 256 experts as in DeepSeek-V3 and 2 of 128 as in the article, and asks

    of a step's loads      how far they exceed chance, how many experts are left, what a capacity of FACTOR drops
    of several layers      the squared deviation from the expected loads, in binomial variances, which is 1 in the mean
                           where chance draws and 0 of an exact workload; what layers share of a token's experts; MaxVio
                           over ranks, of one layer and of LAYERS together
    of ranks               the busiest one with experts in their order, placed by the loads of past steps, and placed
                           as if the step were known (`bench.placed_loads`), without and with redundant experts
    on a dozen slots       the busiest rank of `dsv3.moe.placement` against that of the best placement, found by trying

Over steps the mean stands beside the worst one: a burst is a matter of few steps.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from ablations.routing_workloads_answer import BASELINE, SEEDS, answer
from ablations.routing_workloads_pictures import busiest, maps
from ablations.study import Arm, Cell, Figure, Reading, Study, Value, grid
from bench.measurement import Measurement
from bench.metrics import metric
from bench.record import Profile
from bench.workload_sizes import CHOSEN, FACTOR, LAYERS, PAST, PLACED, SMALL, SMALL_RANKS, SMALL_SLOTS, TOKENS, Ranks

if TYPE_CHECKING:
    from bench.routing_workloads import Workload

ARMS: Mapping[str, str] = {
    "balanced": "forced balance: every expert has the same number of tokens, exactly",
    "zipf": "a router nobody balances: the chance of the expert at place r falls as 1/r",
    "bursty": "a run of similar documents: even, but in a quarter of all windows of 8 steps half of all goes to an "
    "eighth of the experts",
    "drifting": "specialisation that moves: zipf, whose head walks by a place in 16 steps",
    "hot_expert": "collapse onto one expert: it has every token, and the others are even",
    "correlated_layers": "topics, which all layers tell apart: zipf in one order for all layers, and a token keeps the "
    "experts of the layer below with chance 3/4",
    "adversarial": "an enemy of neighbours on a rank and of past loads: exact counts, even in one run of neighbouring "
    "experts, which is another one at the next step",
}
SIZES: Mapping[Profile, tuple[tuple[int, Ranks], ...]] = {
    "quick": ((CHOSEN, PLACED["quick"]),),
    "full": ((CHOSEN, PLACED["full"]), (2, Ranks(experts=128, ranks=16, steps=32))),
}
STEPS: Mapping[Profile, int] = {"quick": 16, "full": 64}
EVERY = 8  # of so many steps, a window of bursty, one is taken where all layers are drawn
APART = (1, 2, 4)  # layers
MAPPED, MAPPED_STEPS = 16, 32  # experts and steps of which a picture shows every load
FEW = 2  # experts of a token where experts are few
LOADS = ("excess_max_vio", "excess_cv_squared", "effective_experts", "dead_experts", "drop_share")


def cells(profile: Profile) -> tuple[Cell, ...]:
    """A cell per seed, which draws all workloads."""
    seconds = {"quick": 6, "full": 90}[profile]
    return grid(seconds=seconds, timed=False, seeds=range(SEEDS[profile]), tokens=(TOKENS[profile],))


def measure(cell: Cell) -> list[Reading]:
    """Everything there is to count of every workload, at the sizes of the profile; of the first seed, loads to draw."""
    import torch

    from bench.routing_workloads import Workload

    assert cell.seed is not None, "every cell of this study has a seed"
    torch.set_num_threads(1)
    tokens = int(cell.axes["tokens"])
    profile: Profile = "full" if tokens == TOKENS["full"] else "quick"
    steps, readings = range(STEPS[profile]), []
    for name in ARMS:
        drawn = partial(Workload, name=name, seed=cell.seed, tokens=tokens)
        for k, ranks in SIZES[profile]:
            workload = drawn(experts=ranks.experts, k=k)
            readings += loads(workload, ranks.ranks, steps)
            readings += layers(workload, ranks.ranks, steps[::EVERY])
            readings += placements(workload, ranks)
        for experts in SMALL[profile]:
            readings += optimum(drawn(experts=experts, k=FEW), steps[:: 2 * EVERY])
        if cell.seed == 0:
            readings += mapped(drawn(experts=MAPPED, k=FEW))
    return readings


def loads(workload: "Workload", ranks: int, steps: Sequence[int]) -> list[Reading]:
    """Balance and drops of one layer, step by step: the mean and the worst."""
    from bench.workload_loads import of_step

    size: dict[str, Value] = {"experts": workload.experts, "k": workload.k, "steps": len(steps)}
    found = [of_step(workload, step=step, ranks=ranks, factor=FACTOR) for step in steps]
    readings = _over_steps(workload, size, {name: [figures[name] for figures in found] for name in LOADS})
    if workload.name == BASELINE:  # chance is the same beside every workload
        readings += _readings(workload, size, {"drop_floor": found[0]["drop_floor"]})
    return readings


def layers(workload: "Workload", ranks: int, steps: Sequence[int]) -> list[Reading]:
    """Counts against the closed form, ranks of one and of many layers, and what layers share of a token's experts."""
    from bench.routing_workloads import expected_overlap
    from bench.workload_loads import of_layers, overlap

    size: dict[str, Value] = {"experts": workload.experts, "k": workload.k, "steps": len(steps)}
    readings = []
    for number in (1, LAYERS):
        at = size | {"layers": number}
        try:
            found = of_layers(workload, layers=number, ranks=ranks, steps=steps)
        except ValueError as error:
            readings.append(_failed(workload, at, "squared_load_deviation", error))
            continue
        for name, value in found.items():
            on = {"ranks": ranks} if name == "rank_max_vio" else {}
            readings += _readings(workload, at | on, {name: value})
    for apart in APART if workload.name in ("zipf", "correlated_layers") else ():
        at = size | {"apart": apart}
        readings += _readings(workload, at, {"layer_overlap": overlap(workload, apart=apart, steps=steps)})
        if workload.name == "correlated_layers":
            readings += _readings(workload, at, {"layer_overlap_expected": expected_overlap(workload, apart=apart)})
    return readings


def placements(workload: "Workload", ranks: Ranks) -> list[Reading]:
    """The busiest rank by way of placing, without redundant experts and with an eighth more."""
    from bench.placed_loads import BASELINE as IN_ORDER
    from bench.placed_loads import busiest_rank

    size: dict[str, Value] = {"experts": workload.experts, "k": workload.k, "steps": ranks.steps, "ranks": ranks.ranks}
    readings = []
    for redundant in (0, workload.experts // 8):
        at = size | {"redundant": redundant}
        try:
            found = busiest_rank(workload, ranks, redundant)
        except AssertionError as error:
            readings.append(_failed(workload, at, "busiest_rank_load", error))
            continue
        for placing, value in found.items():
            if placing != IN_ORDER or redundant == 0:  # in order none is there twice
                readings += _readings(workload, at | {"placing": placing}, {"busiest_rank_load": value})
    return readings


def optimum(workload: "Workload", steps: Sequence[int]) -> list[Reading]:
    """The busiest rank as placed against the best placement of all, on a dozen slots."""
    from bench.placed_loads import to_optimum

    size: dict[str, Value] = {"experts": workload.experts, "k": workload.k, "steps": len(steps), "ranks": SMALL_RANKS}
    try:
        found = to_optimum(workload, ranks=SMALL_RANKS, slots=SMALL_SLOTS, steps=steps)
    except AssertionError as error:
        return [_failed(workload, size, "placement_to_optimum", error)]
    return _over_steps(workload, size, {"placement_to_optimum": found})


def mapped(workload: "Workload") -> list[Reading]:
    """Each expert's load over the mean: the mean over steps, and as samples every step."""
    import numpy as np

    from bench.placed_loads import loads_of

    counts = np.array([loads_of(workload, step) for step in range(MAPPED_STEPS)])
    ratios = counts / counts.mean(axis=1, keepdims=True)
    at: dict[str, Value] = {"experts": workload.experts, "k": workload.k, "steps": MAPPED_STEPS}
    return [
        Reading(
            arm=workload.name,
            measurement=Measurement(metric="load_to_mean", value=fmean(values), n=len(values), samples=tuple(values)),
            axes=at | {"expert": expert},
        )
        for expert, values in enumerate(ratios.T.tolist())
    ]


def _over_steps(workload: "Workload", at: Mapping[str, Value], found: Mapping[str, Sequence[float]]) -> list[Reading]:
    """The mean of each metric over steps, and the worst: the largest, or the smallest where more is better."""
    readings = []
    for name, values in found.items():
        worst = min(values) if metric(name).better == "higher" else max(values)
        for over, value in (("mean", fmean(values)), ("worst", worst)):
            readings += _readings(workload, {**at, "over_steps": over}, {name: value})
    return readings


def _readings(workload: "Workload", at: Mapping[str, Value], figures: Mapping[str, float]) -> list[Reading]:
    return [
        Reading(arm=workload.name, measurement=Measurement(metric=name, value=value), axes=at)
        for name, value in figures.items()
    ]


def _failed(workload: "Workload", at: Mapping[str, Value], name: str, error: Exception) -> Reading:
    return Reading(arm=workload.name, metric=name, failed=str(error), axes=at)


STUDY = Study(
    name="routing_workloads",
    question="What is each routing workload like, and what does placing experts on ranks take off it?",
    arms=tuple(Arm(name, changes) for name, changes in ARMS.items()),
    baseline=BASELINE,
    metrics=(
        "excess_cv_squared",
        "excess_max_vio",
        "effective_experts",
        "dead_experts",
        "drop_share",
        "drop_floor",
        "squared_load_deviation",
        "rank_max_vio",
        "layer_overlap",
        "layer_overlap_expected",
        "busiest_rank_load",
        "placement_to_optimum",
        "load_to_mean",
    ),
    untabled=("load_to_mean",),
    seeds=SEEDS,
    cells=cells,
    measure=measure,
    figures=(
        Figure("maps", f"Loads of {MAPPED} experts, {FEW} of them a token's, step by step", draw=maps),
        Figure(
            "excess_cv_squared",
            "Excess squared CV of a step's loads, mean over steps",
            metric="excess_cv_squared",
            kind="interval",
            where={"over_steps": "mean"},
            reference=(0.0, "chance"),
        ),
        Figure("busiest_rank", "The busiest rank as experts are placed", draw=busiest),
    ),
    answer=answer,
    limits=(
        "Workloads are made up: which of them a trained router is like, its own loads must say.",
        f"Past loads are those of the {PAST} steps before; DeepSeek-V3 (arXiv:2412.19437 section 3.4.1) places by "
        "statistics of minutes, within nodes, and reports no figure of what that gains.",
        "An expert's replicas share its tokens evenly, and moving weights costs nothing.",
    ),
)
