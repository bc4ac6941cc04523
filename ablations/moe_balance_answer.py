"""What `moe_balance` answers: the excess squared CV of the most even causal method and of DeepSeek-V3's bias, what
evenness costs, losses at equal evenness, and the contrast that DeepSeek-V3 reports (arXiv:2412.19437 section 4.5.3).

The most even method is the smallest of several means, and so stands beside those that cannot be told from it. There and
in the contrast each difference is judged by a t interval at ALPHA / COMPARISONS, the strictest level of Holm's family
of all methods against the bias, at which the table of losses says what could have been seen. The contrast asks about
MARGIN: beside it stands the smallest difference that these seeds show, and how many seeds would show MARGIN.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from statistics import fmean

from ablations.balance_methods import STRENGTHS
from ablations.claims import Outcome
from ablations.evidence import Estimate, NoEvidence, Value, decide, estimate, matched, mean, replicates
from ablations.significance import ALPHA, POWER, detectable, pairs_to_see
from ablations.traced import mark, sources_of
from bench.record import Profile, Record

SEEDS: Mapping[Profile, int] = {"quick": 1, "full": 6}
HEADLINE = "excess_cv_squared"  # by which methods are ranked
MATCHED = 2.5  # the excess MaxVio at which losses are compared
ASKED = 1.15  # the excess MaxVio that a good method is asked to stay below
BASELINE = "sign_bias"
PUBLISHED = "deepseek_v3"  # bias and sequence loss together
LOOK_AHEAD = ("expert_choice",)  # no candidate for the most even method
BATCH_WISE, SEQUENCE_WISE = ("global_batch", "switch"), "sequence"
MARGIN = 0.005  # nat/token, between published losses of a sequence and of a batch
COMPARISONS = len(STRENGTHS) - 1  # with the bias: the family that Holm corrects for
JUDGED: Mapping[str, Value] = {"text": "held_out", "loads": "batch"}
OVERALL: Mapping[str, Value] = {"text": "held_out", "loads": "all"}
BUSIEST: Mapping[str, Value] = {**JUDGED, "over_layers": "mean"}  # of excess MaxVio


def answer(records: Sequence[Record]) -> str:
    """The headline of the most even causal method, of what DeepSeek-V3 has and of nothing; the method's busiest expert,
    its rivals and what it costs; then losses at equal evenness and the published contrast.
    """
    steps = _steps(records)
    even = {arm: most_even(records, arm) for arm in STRENGTHS if _has(records, arm, steps)}
    causal = {arm: found for arm, found in even.items() if arm not in LOOK_AHEAD}
    if not causal:
        raise NoEvidence("no training has been judged on held-out text")
    best = min(causal, key=lambda arm: causal[arm][1].value)
    told = [say(records, best, causal) for say in (_headline, _busiest, _rivals, _loss, _over_blocks, _dead)]
    gaps = _gaps(records, even)
    return " ".join(filter(None, (*told, _unseen(records), _losses(gaps), _published(gaps))))


Even = Mapping[str, tuple[str, Estimate]]  # by arm, its most even strength and how even that is


def _named(arm: str, even: Even) -> str:
    """The arm and its strength, which records have chosen."""
    strength, found = even[arm]
    return mark(f"{arm} at {strength}", sources_of(found.value))


def _headline(records: Sequence[Record], best: str, even: Even) -> str:
    """The excess squared CV in a batch and over all of the text."""
    words = {BASELINE: "DeepSeek-V3's bias", PUBLISHED: "its bias and sequence loss together", "none": "nothing"}
    others = []
    for arm, said in words.items():
        with suppress(NoEvidence):
            others.append(f"{_spread(records, arm, 'default')} with {said} ({arm})")
    defaults = f"; at default strengths by {', '.join(others)}" if others else ""
    return (
        "On held-out text, each token for itself, the squared coefficient of variation of the experts' loads exceeds "
        f"chance's by {_spread(records, best, even[best][0])} with the most even causal method, {_named(best, even)}, "
        f"after {_steps(records)} steps{defaults}."
    )


def _spread(records: Sequence[Record], arm: str, strength: str) -> str:
    batch, whole = (_held_out(records, arm, strength, HEADLINE, where) for where in (JUDGED, OVERALL))
    return f"{batch} in a batch and {whole} over all of the text"


def _busiest(records: Sequence[Record], best: str, even: Even) -> str:
    """MaxVio of the method, the bias and nothing: over its floor in a batch, and as it is over all of the text."""
    told = []
    own = even[best][0]
    for arm, strength in dict.fromkeys([(best, own), (BASELINE, "default"), ("none", "default")]):
        with suppress(NoEvidence):
            excess, worst = (
                _held_out(records, arm, strength, "excess_max_vio", {**JUDGED, "over_layers": which})
                for which in ("mean", "max")
            )
            whole = _held_out(records, arm, strength, "max_vio", OVERALL)
            name = _named(arm, even) if (arm, strength) == (best, own) else f"{arm} at {strength}"
            told.append(f"{excess} with {name} ({worst} in the worst layer, {whole} of the mean over all of the text)")
    if not told:
        return ""
    return (
        f"In a batch the busiest expert exceeds the mean load by so many times what chance gives ({ASKED:g} was "
        f"asked): {', '.join(told)}."
    )


def _rivals(records: Sequence[Record], best: str, even: Even) -> str:
    """Which methods cannot be told from the one that is most even in the mean."""
    told = []
    for arm in (arm for arm in even if arm != best):
        with suppress(NoEvidence):
            behind = _apart(records, HEADLINE, arm, best, even, **JUDGED)
            if decide(_corrected(behind), "", at_most=0.0).outcome is Outcome.UNDECIDABLE:
                told.append(arm)
    told.sort(key=lambda arm: even[arm][1].value)
    rivals = ", ".join(f"{_named(arm, even)} ({even[arm][1]})" for arm in told)
    found = f"does not tell it from {rivals}" if told else "tells it from all others"
    return (
        "The method was chosen on the same records, as the smallest mean, which flatters it: a paired t test at "
        f"{ALPHA:g}/{COMPARISONS} {found}."
    )


def _loss(records: Sequence[Record], best: str, even: Even) -> str:
    """The loss of the most even method, beside that of the bias where the bias is most even."""
    with suppress(NoEvidence):
        at: dict[str, Value] = {"strength": even[best][0], "steps": _steps(records)}
        said = f"Its held-out loss is {estimate(records, arm=best, metric='loss', **at)} nat/token"
        if best == BASELINE or BASELINE not in even:
            return f"{said}."
        gap = _apart(records, "loss", best, BASELINE, even)
        return f"{said}, which less that of {_named(BASELINE, even)} (excess squared CV {even[BASELINE][1]}) is {gap}."
    return ""


def _dead(records: Sequence[Record], best: str, even: Even) -> str:
    """Whether experts of the most even method die."""
    with suppress(NoEvidence):
        own = even[best][0]
        dead, dead_of_all = (_held_out(records, best, own, "dead_experts", where) for where in (JUDGED, OVERALL))
        unaided = _held_out(records, "none", "default", "dead_experts", JUDGED)
        return (
            f"In a layer it leaves {dead} experts without a token in a batch and {dead_of_all} in all of the text; "
            f"where nothing balances, {unaided} are left in a batch."
        )
    return ""


def _held_out(records: Sequence[Record], arm: str, strength: str, metric: str, where: Mapping[str, Value]) -> Estimate:
    return estimate(records, arm=arm, metric=metric, strength=strength, steps=_steps(records), **where)


def _apart(records: Sequence[Record], metric: str, ours: str, theirs: str, even: Even, **where: Value) -> Estimate:
    """A figure of one method minus another's, by seed, each at its most even strength."""
    steps = _steps(records)
    mine, other = (
        replicates(records, arm=arm, metric=metric, strength=even[arm][0], steps=steps, **where)
        for arm in (ours, theirs)
    )
    pairs = [float(a.value or 0.0) - float(b.value or 0.0) for a, b in matched(mine, other)]
    if not pairs:
        raise NoEvidence(f"no seed has {metric} of both {ours} and {theirs}")
    return mean(pairs)


def _corrected(found: Estimate) -> Estimate:
    """The same with the t interval of one of so many comparisons in place of that of a single one."""
    if found.low is None or found.high is None:
        return found
    from scipy.special import stdtrit

    wider = stdtrit(found.n - 1, 1 - ALPHA / COMPARISONS / 2) / stdtrit(found.n - 1, 1 - ALPHA / 2)
    below, above = (float(wider) * (end - found.value) for end in (found.low, found.high))
    return replace(found, low=found.value + below, high=found.value + above)


def _over_blocks(records: Sequence[Record], best: str, even: Even) -> str:
    """What is left of the most even method's excess when the text's own unevenness is taken out."""
    with suppress(NoEvidence):
        found = _held_out(records, best, even[best][0], "excess_over_blocks", JUDGED)
        return (
            "Tokens of a text want the same experts, so that a router even over all text is uneven in each batch: its "
            f"busiest expert exceeds the mean by {found} times what is left to such a one."
        )
    return ""


def _unseen(records: Sequence[Record]) -> str:
    """How uneven experts that choose tokens are once they may not."""
    with suppress(NoEvidence):
        found = _spread(records, "expert_choice", "default")
        return f"Experts that choose tokens, even by force in training, are at {found} when tokens choose."
    return ""


def _gaps(records: Sequence[Record], arms: Iterable[str]) -> dict[str, list[float]]:
    """By arm and seed, the loss minus that of DeepSeek-V3's bias where both are as even as MATCHED; no seed of an arm
    that never is.
    """
    losses = {arm: matched_losses(records, arm, _steps(records)) for arm in arms}
    ours = losses.pop(BASELINE, {})
    return {
        arm: [found[seed] - ours[seed] for seed in sorted(found, key=str) if seed in ours]
        for arm, found in losses.items()
    }


def _losses(gaps: Mapping[str, Sequence[float]]) -> str:
    """By how much each method's loss differs from the bias's at equal evenness, and which are never as even."""
    told = [
        f"{arm} {mean(values)}{_sight(values)}"
        for arm, values in sorted(gaps.items(), key=lambda item: fmean(item[1]) if item[1] else 0.0)
        if values
    ]
    if not told:
        return ""
    never = ", ".join(arm for arm, values in gaps.items() if not values)
    return (
        f"Held-out loss at an excess MaxVio of {MATCHED:g} minus that of DeepSeek-V3's bias, nat/token (seen from: the "
        f"smallest difference that a paired t test at {ALPHA:g}/{COMPARISONS} finds with power {POWER:g}): "
        f"{', '.join(told)}." + (f" Never as even at any strength: {never}." if never else "")
    )


def _sight(values: Sequence[float]) -> str:
    return f" (seen from {_least(values)})" if len(values) > 1 else ""


def _least(values: Sequence[float]) -> Estimate:
    """The smallest difference that so many seeds would have shown, at the level that the table corrects to."""
    least = float(f"{detectable(values, alpha=ALPHA / COMPARISONS):.2g}")
    return mean(values).map(lambda _: least)


def _published(gaps: Mapping[str, Sequence[float]]) -> str:
    """Whether a batch-wise loss ends where the bias does and a sequence-wise one above it, as DeepSeek-V3 reports."""
    if not all(gaps.get(arm) for arm in (*BATCH_WISE, SEQUENCE_WISE)):
        return ""
    equal = ", and ".join(_ruled(arm, gaps[arm], -MARGIN, MARGIN) for arm in BATCH_WISE)
    higher = _ruled(SEQUENCE_WISE, gaps[SEQUENCE_WISE], 0.0, math.inf)
    return (
        f"DeepSeek-V3 reports that a batch-wise loss ends where the bias does, and a sequence-wise one {MARGIN:g} "
        f"higher. Here, by intervals at {ALPHA:g}/{COMPARISONS}, an end within {MARGIN:g} of the bias's is "
        f"{equal}; a higher one is {higher}.{_needed(gaps)}"
    )


def _needed(gaps: Mapping[str, Sequence[float]]) -> str:
    """The smallest difference that these seeds show beside the published one, and how many seeds would show that."""
    asked = (*BATCH_WISE, SEQUENCE_WISE)
    if any(len(gaps[arm]) < 2 for arm in asked):
        return ""
    seen = ", ".join(f"{_least(gaps[arm])} for {arm}" for arm in asked)
    # An interval misses [-MARGIN, MARGIN] at either end: half of what may go wrong is left to each.
    within = " and ".join(f"{_seeds(gaps[arm], (1 + POWER) / 2)} for {arm}" for arm in BATCH_WISE)
    return (
        f" With power {POWER:g} these seeds show differences of at least {seen}, beside the {MARGIN:g} reported. At "
        f"their spread it takes {_seeds(gaps[SEQUENCE_WISE], POWER)} seeds to show {MARGIN:g} for {SEQUENCE_WISE}, "
        f"and, were there no difference, {within} to show that an end lies within it."
    )


def _seeds(values: Sequence[float], power: float) -> Estimate:
    needed = pairs_to_see(MARGIN, values, alpha=ALPHA / COMPARISONS, power=power)
    return mean(values).map(lambda _: needed)


def _ruled(arm: str, values: Sequence[float], least: float, most: float) -> str:
    """What is said of a published difference that lies in [least, most]: nothing before all declared seeds."""
    found = _corrected(mean(values))
    whole = len(values) >= SEEDS["full"]
    outcome = decide(found, "", at_least=least, at_most=most).outcome if whole else Outcome.UNDECIDABLE
    words = {Outcome.HOLDS: "reproduced", Outcome.FAILS: "refuted", Outcome.UNDECIDABLE: "not decidable"}
    return f"{words[outcome]} for {arm}, {found}{_sight(values)}"


def _steps(records: Sequence[Record]) -> int:
    steps = [int(record.axes["steps"]) for record in records if "steps" in record.axes]
    if not steps:
        raise NoEvidence("nothing was trained")
    return max(steps)


def _has(records: Sequence[Record], arm: str, steps: int) -> bool:
    return any((row.arm, row.metric, row.axes.get("steps")) == (arm, HEADLINE, steps) for row in records)


def most_even(records: Sequence[Record], arm: str) -> tuple[str, Estimate]:
    """The strength at which the arm is most even in the mean over seeds, and how even."""
    found = {}
    for strength in STRENGTHS[arm]:
        with suppress(NoEvidence):  # not trained yet, or diverged
            found[strength] = _held_out(records, arm, strength, HEADLINE, JUDGED)
    strength = min(found, key=lambda name: found[name].value)
    return strength, found[strength]


def matched_losses(records: Sequence[Record], arm: str, steps: int) -> dict[int | None, float]:
    """By seed the held-out loss at an excess of MATCHED; seeds in which no strength is as even are left out."""
    points: dict[int | None, list[tuple[float, float]]] = {}
    for strength in STRENGTHS[arm]:
        with suppress(NoEvidence):
            excess = replicates(records, arm=arm, metric="excess_max_vio", strength=strength, steps=steps, **BUSIEST)
            loss = replicates(records, arm=arm, metric="loss", strength=strength, steps=steps)
            for seed in excess.keys() & loss.keys():
                points.setdefault(seed, []).append((float(excess[seed].value or 0.0), float(loss[seed].value or 0.0)))
    found = {seed: loss_at(pairs, MATCHED) for seed, pairs in points.items()}
    return {seed: loss for seed, loss in found.items() if loss is not None}


def loss_at(points: Sequence[tuple[float, float]], excess: float) -> float | None:
    """The loss of (excess, loss) points, weak to strong, where the excess is that: see moe_balance."""
    evenest = min(range(len(points)), key=lambda place: points[place][0])
    rising = points[: evenest + 1]
    as_even = [point for point in rising if point[0] <= excess]
    uneven = [point for point in rising if point[0] > excess]
    if not as_even:
        return None
    (x0, y0) = max(as_even)
    if not uneven:
        return y0
    (x1, y1) = min(uneven)
    return y0 + math.log(excess / x0) / math.log(x1 / x0) * (y1 - y0)
