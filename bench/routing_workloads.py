"""Routing workloads: the experts of N tokens from (name, seed, step) alone, with expected loads in closed form.

They drive whatever routing drives (dispatch, capacity, placement, all-to-all) without a router and without text, and
may serve other projects as a benchmark of token imbalance. pi_e is the chance that a token goes to expert e, so that
the expert expects N pi_e tokens, and sum pi_e = K. Experts have places r = 0, 1, ... in an order drawn from (seed,
layer), of bursty anew in each window; s is the step, G = ceil(E / 8), and `~` says proportional to, but at most 1 (what
is above is shared out among the others):

    name                 pi of the expert at place r                                         what it is like
    balanced             exact counts, N K / E of each; if not whole, some take one more     forced balance
    zipf                 ~ 1 / (r + 1)                                                       a router nobody balances
    bursty               K / E, but in a quarter of all windows of 8 steps, in all layers    a run of similar documents
                         at once: half of all pairs go to G experts, half to the others
    drifting             ~ (1 - t) z(r + q) + t z(r + q + 1), z(r) = 1 / (r mod E + 1),      specialisation that moves
                         s / 16 = q + t: the head of zipf walks by a place in 16 steps
    hot_expert           1 at place 0, (K - 1) / (E - 1) elsewhere                           collapse onto one expert
    correlated_layers    as zipf, one order for all layers; a token keeps the experts        topics, which all layers
                         of the layer below with chance 3/4, else draws again                tell apart
    adversarial          exact counts, as even as can be in one of floor(E / max(K, G))      an enemy of neighbours on a
                         runs of neighbouring experts, each once in as many steps            rank and of past loads

Adversarial is even in the mean over steps, and at every step has all its load where there was none the step before. Two
layers of correlated_layers that are d apart share rho^d K + (1 - rho^d) sum pi_e^2 experts of a token in the mean, with
rho = 3/4.

Choices have the pi above exactly, for any K: all experts are laid end to end in random order with lengths pi, and a
token with the draw u in [0, 1) takes those in which u, u + 1, ..., u + K - 1 lie (systematic sampling, Madow 1949). An
expert is at most 1 long, so the K are distinct. 64 tokens share an order: given any order the chance of an expert is
pi_e and tokens are independent, so its count is binomial (N, pi_e). Gate weights are uniform numbers over their sum,
independent of the choice.

Bits do not depend on the machine: random words are those of Philox, whose stream numpy keeps, keyed by SHA-256; the pi
are whole multiples of 2^-32; and floating point enters with one division, which IEEE 754 rounds in one way. That is why
`dsv3.moe.load.distinct_experts` is not used here: numpy may change what its generators make of the words.
"""

from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from jaxtyping import Float, Int

from dsv3.config.rules import require, require_one_of, require_positive

NAMES = ("balanced", "zipf", "bursty", "drifting", "hot_expert", "correlated_layers", "adversarial")
EXACT = ("balanced", "adversarial")  # their counts are no matter of chance

ONE = 2**32  # the pi are counted in parts of this
ZIPF = 2**40  # the weight at place 0
PARTS = 8  # a burst or an attack is on one in so many experts
WINDOW = 8  # steps that burst or do not
PACE = 16  # steps in which drifting moves by a place
KEEP = 3 * ONE // 4  # the chance that a token keeps the experts of the layer below
SHARED = 64  # tokens that share an order of the experts

Numbers = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`tokens` tokens that each go to `k` of `experts` experts, as the workload of this name has it."""

    name: str
    seed: int = 0
    tokens: int
    experts: int
    k: int

    def __post_init__(self) -> None:
        require_one_of(self, "name", NAMES)
        require_positive(self, "experts", "k")
        rule = f"must be at most experts={self.experts}, since a token's experts are distinct"
        require(self.k <= self.experts, "k", self.k, rule, "lower k")
        for name in ("seed", "tokens"):
            _require_count(name, getattr(self, name))


@dataclass(frozen=True)
class Assignment:
    """The experts of each token, distinct and in no particular order, and their gate weights, which add up to 1."""

    indices: Int[Numbers, "N K"]
    weights: Float[Numbers, "N K"]


def draw(workload: Workload, *, step: int, layer: int = 0) -> Assignment:
    """The assignment of a step in a layer; row n is the same token in every layer."""
    _require_count("step", step)
    _require_count("layer", layer)
    if workload.name in EXACT:
        indices = _spread(workload, step, layer)
    elif workload.name == "correlated_layers":
        indices = _sample(workload, step, 0)
        for above in range(1, layer + 1):
            again = _words(workload, workload.tokens, "again", step, above) >> 32 >= KEEP
            indices[again] = _sample(workload, step, above)[again]
    else:
        indices = _sample(workload, step, layer)
    return Assignment(indices, _gate_weights(workload, step, layer))


def expected_loads(workload: Workload, *, step: int, layer: int = 0) -> Float[Numbers, " E"]:
    """The expected tokens of each expert, without rounding below 2^21 tokens; of an exact workload the tokens."""
    _require_count("step", step)
    _require_count("layer", layer)
    if workload.name not in EXACT:
        return shares(workload, step=step, layer=layer) * workload.tokens / ONE
    members = _members(workload, step, layer)
    each, more = divmod(workload.tokens * workload.k, len(members))
    loads = np.zeros(workload.experts)
    loads[members] = each
    loads[members[:more]] += 1
    return loads


def squared_deviation(workload: Workload, counts: Int[Numbers, " E"], *, step: int, layer: int = 0) -> float:
    """How far counted tokens lie from `expected_loads`: (count - N pi)^2 / (N pi (1 - pi)), the mean over the experts.

    Counts of a workload that is drawn by chance have 1 in the mean, exactly, since each is binomial; those of an exact
    workload have 0. Experts with a pi of 0 or 1 leave nothing to chance, and are left out.

    Raises:
        ValueError: such an expert with another count.
    """
    expected = expected_loads(workload, step=step, layer=layer)
    variance = expected * (1 - expected / max(workload.tokens, 1))
    by_chance = variance > 0
    wrong = np.flatnonzero((counts != expected) & ~by_chance).tolist()
    rule = "must have all tokens or none, as their pi says"
    require(not wrong, "experts", wrong, rule, "count the tokens of this step and layer, before any is dropped")
    return float(((counts - expected)[by_chance] ** 2 / variance[by_chance]).mean()) if by_chance.any() else 0.0


def expected_overlap(workload: Workload, *, apart: int) -> float:
    """How many experts of a token two layers of correlated_layers share in the mean, so many layers apart."""
    rule = "must be correlated_layers, the one whose layers are not independent"
    require(workload.name == "correlated_layers", "name", workload.name, rule, "vary the name")
    kept = (KEEP / ONE) ** apart
    chance = shares(workload, step=0) / ONE
    return float(kept * workload.k + (1 - kept) * (chance**2).sum())


def burst(workload: Workload, *, step: int) -> bool:
    """Whether a step of bursty lies in a window that bursts."""
    return bool(_words(workload, 1, "burst", step // WINDOW)[0] % 4 == 0)


def shares(workload: Workload, *, step: int, layer: int = 0) -> Int[Numbers, " E"]:
    """pi_e times 2^32, of a workload that is drawn by chance."""
    experts, k = workload.experts, workload.k
    rule = "must be a workload drawn by chance, which those of exact counts are not"
    require(workload.name not in EXACT, "name", workload.name, rule, "use expected_loads")
    match workload.name:
        case "zipf" | "correlated_layers":
            by_place = apportion(_zipf(experts), k)
        case "bursty":
            group = -(-experts // PARTS)
            weights = [experts - group] * group + [group] * (experts - group)
            by_place = apportion(weights if burst(workload, step=step) else [1] * experts, k)
        case "drifting":
            (q, t), z = divmod(step, PACE), _zipf(experts)
            weights = [(PACE - t) * z[(r + q) % experts] + t * z[(r + q + 1) % experts] for r in range(experts)]
            by_place = apportion(weights, k)
        case _:
            by_place = [ONE, *apportion([1] * (experts - 1), k - 1)]
    found = np.empty(experts, dtype=np.int64)
    found[_order_of_experts(workload, step, layer)] = by_place
    return found


def apportion(weights: list[int], k: int) -> list[int]:
    """Whole shares that add up to k * ONE, each at most ONE, proportional to the weights among those below ONE.

    What rounding down leaves goes one by one to the largest below ONE.
    """
    order = sorted(range(len(weights)), key=lambda place: -weights[place])
    full, rest = 0, sum(weights)
    while full < k and (k - full) * weights[order[full]] >= rest:
        rest -= weights[order[full]]
        full += 1
    found = [ONE] * len(weights)
    for place in order[full:]:
        found[place] = (k - full) * ONE * weights[place] // max(rest, 1)
    for place in order[full : full + k * ONE - sum(found)]:
        found[place] += 1
    return found


def _zipf(experts: int) -> list[int]:
    return [ZIPF // (place + 1) for place in range(experts)]


def _order_of_experts(workload: Workload, step: int, layer: int) -> Numbers:
    """The expert at each place. It stays over steps, but for the group that bursts."""
    if workload.name == "correlated_layers":
        return _permutation(workload, workload.experts, "order")
    if workload.name == "bursty":
        return _permutation(workload, workload.experts, "order", step // WINDOW, layer)
    return _permutation(workload, workload.experts, "order", layer)


def _sample(workload: Workload, step: int, layer: int) -> Numbers:
    experts, tokens = workload.experts, workload.tokens
    chances = shares(workload, step=step, layer=layer)
    groups = -(-tokens // SHARED)
    words = _words(workload, -(-groups * experts // 4), "orders", step, layer)
    # Equal keys keep their order, which is then not quite random; the chances hold for any order.
    keys = words.view("<u2")[: groups * experts].reshape(groups, experts)
    starts = (_words(workload, tokens, "choice", step, layer) >> 32).astype(np.int64)
    indices = np.empty((tokens, workload.k), dtype=np.int64)
    for at, order in enumerate(keys.argsort(axis=1, kind="stable")):
        here = slice(at * SHARED, (at + 1) * SHARED)
        marks = starts[here, None] + np.arange(workload.k) * ONE
        indices[here] = order[chances[order].cumsum().searchsorted(marks, side="right")]
    return indices


def _spread(workload: Workload, step: int, layer: int) -> Numbers:
    members = _members(workload, step, layer)
    pairs = np.arange(workload.tokens * workload.k).reshape(workload.tokens, workload.k)
    return members[pairs % len(members)][_permutation(workload, workload.tokens, "tokens", step, layer)]


def _members(workload: Workload, step: int, layer: int) -> Numbers:
    """The experts that share the pairs evenly, first those that take one more."""
    experts = workload.experts
    if workload.name == "balanced":
        return _permutation(workload, experts, "order", step, layer)
    runs = experts // max(workload.k, -(-experts // PARTS))
    attacked = _permutation(workload, runs, "runs")[step % runs]
    return np.flatnonzero(np.arange(experts) * runs // experts == attacked)


def _gate_weights(workload: Workload, step: int, layer: int) -> Numbers:
    words = _words(workload, workload.tokens * workload.k, "weights", step, layer)
    whole = ((words >> 32) + 1).astype(np.int64).reshape(workload.tokens, workload.k)
    return whole / whole.sum(axis=1, keepdims=True)


def _permutation(workload: Workload, size: int, *purpose: object) -> Numbers:
    return _words(workload, size, *purpose).argsort(kind="stable")


def _words(workload: Workload, number: int, *purpose: object) -> Numbers:
    """Random 64-bit words of the stream that is for this purpose."""
    text = "/".join(map(str, (workload.name, workload.seed, *purpose)))
    key = int.from_bytes(sha256(text.encode()).digest()[:16], "little")
    return np.random.Philox(key=key).random_raw(number).astype("<u8")


def _require_count(name: str, value: object) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole and value >= 0, name, value, "must be a whole number of at least 0", f"pass {name} as 0, 1, ...")  # type: ignore[operator]
