"""Which ranks hold which experts, some of them several times, so that the busiest rank does as little as possible.

R ranks have S slots each, R S >= E. Expert e with load l_e gets n_e >= 1 slots, sum n_e = R S, and its replicas share
its load evenly:

    minimise over n and placement   max over ranks of   sum over the rank's slots of  l_e / n_e

This is what DeepSeek-V3 serves with (redundant experts, arXiv 2412.19437 section 3.4). It contains number partitioning,
so that the optimum is out of reach. Two steps come near it:

    replicate   each spare slot goes to the expert with the largest l_e / n_e; one with R replicas waits until all have
                as many, since a rank gains nothing from a second
    pack        replicas by falling load, each to the least loaded rank with a free slot; then the best exchange of two
                replicas between the busiest rank and another, until none helps

Let e be the expert of the largest replica, of load M. If it has R replicas or more, M <= l_e / R <= mean. If it has
fewer, any n with a smaller M gives it more slots, and so to some other fewer than here, whose replica was at least M
when it got the last of these, and is so there. Hence M <= optimum. Now let no exchange help the busiest rank, of load
H, and let another have load L < H. Both hold S replicas, so one x there is larger than one y here, and moving x - y
over makes this rank as busy: H <= L + x - y <= L + M. Summed over the other ranks,

    H <= mean + (1 - 1/R) M <= (2 - 1/R) optimum

Large replicas alone can leave nothing small to fill up with. So every split of the spare slots is tried, some to the
largest as above and the others to the smallest l_e / n_e, and the best is taken. The tests measure how near that comes.

With nodes, groups of experts stay on one node each, as routing that is limited to nodes wants it: groups are packed
onto nodes in the same way, and experts onto the ranks of their node.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Real

from dsv3.config.rules import require

ROUNDING = 1e-12  # an exchange that gains less than this share of a load gains nothing


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the experts are.

    Attributes:
        slots: per rank, the experts in its slots; one may be there twice, which saves nothing and costs no time.
        replicas: per expert, how many slots have it.
        largest: the load of the busiest rank.
        mean: the mean load of a rank, which no placement goes below.
    """

    slots: tuple[tuple[int, ...], ...]
    replicas: tuple[int, ...]
    largest: float
    mean: float

    def rank_loads(self, loads: Real[np.ndarray, " E"]) -> Float[np.ndarray, " R"]:
        """The load of each rank under these loads of the experts, which may be those of a later step."""
        return _rank_loads(loads, np.array(self.slots))


def place(loads: Real[np.ndarray, " E"], *, ranks: int, slots: int, groups: int = 1, nodes: int = 1) -> Placement:
    """Experts of these loads on `ranks` ranks of `slots` slots.

    Ranks r * ranks / nodes and up are those of node r; group g has the experts g * E / groups and up.

    Raises:
        ValueError: loads that are none, too few slots, or nodes and groups that do not divide what they should.
    """
    _check(loads, ranks, slots, groups, nodes)
    by_group = np.arange(len(loads)).reshape(groups, -1)
    held = []
    for of_node in pack(loads.reshape(groups, -1).sum(axis=1), nodes):
        experts = np.sort(by_group[of_node].ravel())
        held.append(experts[_best_slots(loads[experts], ranks // nodes, slots)])
    table = np.concatenate(held)
    busy = _rank_loads(loads, table)
    return Placement(
        slots=tuple(map(tuple, table.tolist())),
        replicas=tuple(np.bincount(table.ravel()).tolist()),
        largest=float(busy.max()),
        mean=float(loads.sum() / ranks),
    )


def lower_bound(loads: Real[np.ndarray, " E"], *, ranks: int, slots: int) -> float:
    """What no placement goes below: the mean load of a rank, and the largest replica where it is smallest."""
    _check(loads, ranks, slots)
    return float(max(loads.sum() / ranks, (loads / replicate(loads, ranks, slots)).max()))


def replicate(loads: Real[np.ndarray, " E"], ranks: int, slots: int, *, smallest: int = 0) -> Int[np.ndarray, " E"]:
    """Replicas per expert, at least one each; so many spare slots go to the smallest, the others to the largest."""
    replicas = np.ones(len(loads), dtype=np.int64)
    spare = ranks * slots - len(loads)
    for sign in [-1] * (spare - smallest) + [1] * smallest:
        # Among equals, as experts without load are, whichever has fewest.
        replicas[np.lexsort((replicas, sign * loads / replicas, replicas // ranks))[0]] += 1
    return replicas


def pack(weights: Real[np.ndarray, " items"], bins: int) -> Int[np.ndarray, "bins each"]:
    """Equally many items in each bin, the heaviest bin light."""
    each = len(weights) // bins
    packed = np.zeros((bins, each), dtype=np.int64)
    totals, filled = np.zeros(bins), np.zeros(bins, dtype=np.int64)
    for item in np.argsort(-weights, kind="stable"):
        chosen = np.lexsort((filled, np.where(filled < each, totals, np.inf)))[0]
        packed[chosen, filled[chosen]] = item
        totals[chosen] += weights[item]
        filled[chosen] += 1
    while _exchange(packed, weights):
        pass
    return packed


def _exchange(packed: np.ndarray, weights: np.ndarray) -> bool:
    """Make the exchange between the heaviest bin and another that helps most; False if none does."""
    inside = weights[packed].astype(np.float64)
    totals = inside.sum(axis=1)
    heaviest = int(totals.argmax())
    moved = inside[heaviest][:, None, None] - inside
    after = np.maximum(totals[heaviest] - moved, totals[:, None] + moved)
    after[:, heaviest] = np.inf
    item, other, place = np.unravel_index(after.argmin(), after.shape)
    if not after[item, other, place] < totals[heaviest] * (1 - ROUNDING):
        return False
    packed[heaviest, item], packed[other, place] = packed[other, place], packed[heaviest, item]
    return True


def reference_largest_load(loads: Real[np.ndarray, " E"], *, ranks: int, slots: int) -> float:
    """The load of the busiest rank in the best placement of all, by trying them; for a dozen slots at most."""
    _check(loads, ranks, slots)
    best = math.inf
    for replicas in _ways_to_replicate(len(loads), ranks * slots):
        weights = sorted(np.repeat(loads / replicas, replicas).tolist(), reverse=True)
        best = _best_packing(weights, [(0.0, slots)] * ranks, best)
    return best


def _best_slots(loads: np.ndarray, ranks: int, slots: int) -> np.ndarray:
    tables = []
    for smallest in range(ranks * slots - len(loads) + 1):
        replicas = replicate(loads, ranks, slots, smallest=smallest)
        copies = np.repeat(np.arange(len(loads)), replicas)
        tables.append(np.sort(copies[pack((loads / replicas)[copies], ranks)], axis=1))
    return min(tables, key=lambda table: _rank_loads(loads, table).max())


def _ways_to_replicate(experts: int, slots: int) -> Iterator[tuple[int, ...]]:
    if experts == 1:
        yield (slots,)
        return
    for first in range(1, slots - experts + 2):
        for rest in _ways_to_replicate(experts - 1, slots - first):
            yield (first, *rest)


def _best_packing(weights: list[float], bins: list[tuple[float, int]], best: float) -> float:
    """The least heaviest bin when these weights are added to bins of this load and room; `best` if not below it."""
    if not weights:
        return max(load for load, _ in bins)
    first, *rest = weights
    for load, room in sorted(set(bins)):  # bins that are equal need trying once
        if room and load + first < best:
            others = list(bins)
            others.remove((load, room))
            best = _best_packing(rest, [*others, (load + first, room - 1)], best)
    return best


def _rank_loads(loads: np.ndarray, table: np.ndarray) -> np.ndarray:
    return (loads / np.bincount(table.ravel()))[table].sum(axis=1)


def _check(loads: np.ndarray, ranks: int, slots: int, groups: int = 1, nodes: int = 1) -> None:
    for name, value in {"ranks": ranks, "slots": slots, "groups": groups, "nodes": nodes}.items():
        require(value >= 1, name, value, "must be at least 1", f"pass {name}=1 or more")
    experts = len(loads)
    good = experts > 0 and bool(np.isfinite(loads).all()) and bool((loads >= 0).all())
    require(good, "loads", loads.tolist(), "must be finite, at least 0 and of one expert or more", "pass token counts")
    rule = f"must give each of {experts} experts a slot on ranks={ranks}"
    require(ranks * slots >= experts, "slots", slots, rule, f"pass slots={-(-experts // ranks)} or more")
    rule = f"must divide the {experts} experts evenly"
    require(experts % groups == 0, "groups", groups, rule, "pass the router's n_group")
    rule = f"must divide ranks={ranks} and groups={groups}"
    require(ranks % nodes == groups % nodes == 0, "nodes", nodes, rule, "pass a divisor of both")
