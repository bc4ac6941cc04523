"""What `moe_balance` answers: the most even causal method and what it costs, losses at equal evenness, and the contrast
that DeepSeek-V3 reports (arXiv:2412.19437 section 4.5.3).

The most even method is the smallest of several means, and so stands beside those that cannot be told from it. There and
in the contrast each difference is judged by a t interval at ALPHA / COMPARISONS, the strictest level of Holm's family
of all methods against the bias, at which the table of losses says what could have been seen.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from statistics import fmean

from ablations.balance_methods import STRENGTHS
from ablations.claims import Outcome
from ablations.evidence import Estimate, NoEvidence, Value, decide, estimate, matched, mean, replicates
from ablations.significance import ALPHA, POWER, detectable
from ablations.traced import mark, sources_of
from bench.record import Profile, Record

SEEDS: Mapping[Profile, int] = {"quick": 1, "full": 6}
MATCHED = 2.5  # the excess MaxVio at which losses are compared
ASKED = 1.15  # the excess MaxVio that a good method is asked to stay below
BASELINE = "sign_bias"
PUBLISHED = "deepseek_v3"  # bias and sequence loss together
LOOK_AHEAD = ("expert_choice",)  # no candidate for the most even method
BATCH_WISE, SEQUENCE_WISE = ("global_batch", "switch"), "sequence"
MARGIN = 0.005  # nat/token, between published losses of a sequence and of a batch
COMPARISONS = len(STRENGTHS) - 1  # with the bias: the family that Holm corrects for
JUDGED: Mapping[str, Value] = {"text": "held_out", "loads": "batch", "over_layers": "mean"}


def answer(records: Sequence[Record]) -> str:
    """The most even causal method, against both floors and its rivals, and what it costs; then losses at equal evenness
    and the published contrast.
    """
    steps = _steps(records)
    even = {arm: most_even(records, arm, steps) for arm in STRENGTHS if _has(records, arm, steps)}
    causal = {arm: found for arm, found in even.items() if arm not in LOOK_AHEAD}
    if not causal:
        raise NoEvidence("no training has been judged on held-out text")
    best = min(causal, key=lambda arm: causal[arm][1].value)
    unaided = estimate(records, arm="none", metric="excess_max_vio", strength="default", steps=steps, **JUDGED)
    first = (
        f"On held-out text, each token for itself, the busiest expert exceeds the mean by {even[best][1]} times what "
        f"chance gives with the most even causal method, {_named(best, even)} ({ASKED:g} was asked), and by {unaided} "
        f"times when nothing balances, after {steps} steps."
    )
    blocks = _over_blocks(records, best, even[best][0])
    rivals, loss, loads = (say(records, best, causal) for say in (_rivals, _loss, _loads))
    gaps = _gaps(records, even)
    matched_loss = _losses(gaps), _published(gaps)
    return " ".join(filter(None, (first, rivals, loss, blocks, loads, _unseen(records, steps), *matched_loss)))


Even = Mapping[str, tuple[str, Estimate]]  # by arm, its most even strength and how even that is


def _named(arm: str, even: Even) -> str:
    """The arm and its strength, which records have chosen."""
    strength, found = even[arm]
    return mark(f"{arm} at {strength}", sources_of(found.value))


def _rivals(records: Sequence[Record], best: str, even: Even) -> str:
    """Which methods cannot be told from the one that is most even in the mean."""
    told = []
    for arm in (arm for arm in even if arm != best):
        with suppress(NoEvidence):
            behind = _apart(records, "excess_max_vio", arm, best, even, **JUDGED)
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
        return f"{said}, which less that of {_named(BASELINE, even)} (excess {even[BASELINE][1]}) is {gap}."
    return ""


def _loads(records: Sequence[Record], best: str, even: Even) -> str:
    """Whether experts of the most even method die, and its squared CV beside that of the bias, as published, and of
    nothing.
    """
    with suppress(NoEvidence):
        own = even[best][0]
        dead, dead_of_all = (_held_out(records, best, own, "dead_experts", loads=loads) for loads in ("batch", "all"))
        unaided = _held_out(records, "none", "default", "dead_experts")
        others = ", ".join(
            f"{arm} {_held_out(records, arm, 'default', 'excess_cv_squared')}"
            for arm in (BASELINE, PUBLISHED, "none")
            if arm in even
        )
        return (
            f"In a layer it leaves {dead} experts without a token in a batch and {dead_of_all} in all of the text; "
            f"where nothing balances, {unaided} are left in a batch. The squared coefficient of variation of its loads "
            f"exceeds chance's by {_held_out(records, best, own, 'excess_cv_squared')}; at default strengths: {others}."
        )
    return ""


def _held_out(records: Sequence[Record], arm: str, strength: str, metric: str, *, loads: str = "batch") -> Estimate:
    at: dict[str, Value] = {"strength": strength, "steps": _steps(records)}
    return estimate(records, arm=arm, metric=metric, text="held_out", loads=loads, **at)


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


def _over_blocks(records: Sequence[Record], arm: str, strength: str) -> str:
    """What is left of the most even method's excess when the text's own unevenness is taken out."""
    with suppress(NoEvidence):
        at: dict[str, Value] = {"strength": strength, "steps": _steps(records)}
        found = estimate(records, arm=arm, metric="excess_over_blocks", **at)
        return (
            "Tokens of a text want the same experts, so that a router even over all text is uneven in each batch: over "
            f"that its excess is {found}."
        )
    return ""


def _unseen(records: Sequence[Record], steps: int) -> str:
    """How uneven experts that choose tokens are once they may not."""
    with suppress(NoEvidence):
        at: dict[str, Value] = {"strength": "default", "steps": steps}
        found = estimate(records, arm="expert_choice", metric="excess_max_vio", **at, **JUDGED)
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
        f"Held-out loss at an excess of {MATCHED:g} minus that of DeepSeek-V3's bias, nat/token (seen from: the "
        f"smallest difference that a paired t test at {ALPHA:g}/{COMPARISONS} finds with power {POWER:g}): "
        f"{', '.join(told)}." + (f" Never as even at any strength: {never}." if never else "")
    )


def _sight(values: Sequence[float]) -> str:
    """The smallest difference that so many seeds would have shown, at the level that the table corrects to."""
    if len(values) < 2:
        return ""
    least = float(f"{detectable(values, alpha=ALPHA / COMPARISONS):.2g}")
    return f" (seen from {mean(values).map(lambda _: least)})"


def _published(gaps: Mapping[str, Sequence[float]]) -> str:
    """Whether a batch-wise loss ends where the bias does and a sequence-wise one above it, as DeepSeek-V3 reports."""
    if not all(gaps.get(arm) for arm in (*BATCH_WISE, SEQUENCE_WISE)):
        return ""
    equal = ", and ".join(_ruled(arm, gaps[arm], -MARGIN, MARGIN) for arm in BATCH_WISE)
    higher = _ruled(SEQUENCE_WISE, gaps[SEQUENCE_WISE], 0.0, math.inf)
    return (
        f"DeepSeek-V3 reports that a batch-wise loss ends where the bias does, and a sequence-wise one {MARGIN:g} "
        f"higher. Here, by intervals at {ALPHA:g}/{COMPARISONS}, an end within {MARGIN:g} of the bias's is "
        f"{equal}; a higher one is {higher}."
    )


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
    return any((row.arm, row.metric, row.axes.get("steps")) == (arm, "excess_max_vio", steps) for row in records)


def most_even(records: Sequence[Record], arm: str, steps: int) -> tuple[str, Estimate]:
    """The strength at which the arm is most even in the mean over seeds, and how even."""
    found = {}
    for strength in STRENGTHS[arm]:
        with suppress(NoEvidence):  # not trained yet, or diverged
            at: dict[str, Value] = {"strength": strength, "steps": steps, **JUDGED}
            found[strength] = estimate(records, arm=arm, metric="excess_max_vio", **at)
    strength = min(found, key=lambda name: found[name].value)
    return strength, found[strength]


def matched_losses(records: Sequence[Record], arm: str, steps: int) -> dict[int | None, float]:
    """By seed the held-out loss at an excess of MATCHED; seeds in which no strength is as even are left out."""
    points: dict[int | None, list[tuple[float, float]]] = {}
    for strength in STRENGTHS[arm]:
        with suppress(NoEvidence):
            excess = replicates(records, arm=arm, metric="excess_max_vio", strength=strength, steps=steps, **JUDGED)
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
