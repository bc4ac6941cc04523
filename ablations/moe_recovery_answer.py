"""What `moe_recovery` answers: who is out of the collapse within ASKED updates, who ever, and DeepSeek-V3's design.

Trainings that never recover while they are watched have no number of updates. So a mean over a method's seeds is said
only where all of them recover; of the others the share that does.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ablations.balance_methods import ASKED, TRIED
from ablations.evidence import Estimate, NoEvidence, Value, estimate, matched, mean, replicates
from ablations.traced import mark, sources_of
from bench.metrics import RECOVERED
from bench.record import Profile, Record
from dsv3.config import SignBias

SEEDS: Mapping[Profile, int] = {"quick": 1, "full": 6}
BASELINE = "deepseek_v3"
RATE = SignBias().rate  # of the baseline's bias, as published
LOOK_AHEAD = ("expert_choice",)  # no candidate for the best causal method


@dataclass(frozen=True)
class Found:
    """What trainings under a method at a strength came to: the share that recovered, and after how many updates each
    that did.
    """

    arm: str
    strength: str
    share: Estimate
    after: tuple[float, ...]

    @property
    def always(self) -> bool:
        """Whether all trainings recovered."""
        return self.share.value == 1.0

    @property
    def in_time(self) -> bool:
        """Whether all did within what was asked."""
        return self.always and max(self.after) <= ASKED


def answer(records: Sequence[Record]) -> str:
    """Who recovers in time, who later, in part or never; the best beside DeepSeek-V3's design; experts that die."""
    watched = _watched(records)
    found = [one for arm, strengths in TRIED.items() for one in _found(records, arm, strengths, watched)]
    if not found:
        raise NoEvidence("no training has gone on from a collapse")
    quick = [one for one in found if one.in_time]
    late = [one for one in found if one.always and not one.in_time]
    part = [one for one in found if 0.0 < one.share.value < 1.0]
    never = [one for one in found if one.share.value == 0.0]
    said = [
        _collapse(records, watched),
        f"Out of it, at {RECOVERED:g} times chance, are after at most {ASKED} updates, as asked, all trainings with "
        f"{_listed(quick, records, watched)}; all, but some later, with {_listed(late, records, watched)}; a part, "
        f"within {watched} updates, with {_shares(part)}; no training, in {watched} updates, with {_names(never)}.",
        _best([one for one in found if one.always and one.arm not in LOOK_AHEAD], records, watched),
        _published(records, watched),
        _dead(found, records, watched),
    ]
    return " ".join(filter(None, said))


def _collapse(records: Sequence[Record], watched: int) -> str:
    """How far routers were brought, and how even they were before."""
    at: dict[str, Value] = {"strength": "default", "updates": 0, "watched": watched}
    start, excess = (estimate(records, arm=BASELINE, metric=name, **at) for name in ("max_vio", "excess_max_vio"))
    before, blocks = (
        estimate(records, arm=BASELINE, metric=name, router="healthy", watched=watched)
        for name in ("excess_max_vio", "excess_over_blocks")
    )
    return (
        f"Routers whose busiest expert exceeded the mean by {before} times what chance gives, and by {blocks} times "
        f"what an even router's would on the same text, were collapsed to MaxVio {start}, {excess} times chance."
    )


def _best(candidates: Sequence[Found], records: Sequence[Record], watched: int) -> str:
    """The causal method that is out first, what it comes to and what that costs."""
    if not candidates:
        return ""
    best = min(candidates, key=lambda one: sum(one.after) / len(one.after))
    early = min(ASKED, watched)
    soon, last = (_excess(records, best.arm, best.strength, update, watched) for update in (early, watched))
    dead = _at(records, best.arm, best.strength, "dead_experts", watched, updates=early)
    behind = ", ".join(
        f"{_named(one)} {_less(records, 'recovery_steps', (one.arm, one.strength), (best.arm, best.strength), watched)}"
        for one in sorted(candidates, key=lambda one: sum(one.after))
        if one is not best
    )
    gap = _less(records, "loss", (best.arm, best.strength), (BASELINE, "default"), watched)
    return (
        f"The first out of the causal ones is {_named(best)}, at {soon} times chance after {early} updates and {last} "
        f"after {watched} updates, with {dead} experts of a layer without a token in a batch after {early} updates. "
        f"Updates of others less its own, the smallest of several means, which flatters it: {behind or 'none'}. "
        f"Its held-out loss after {watched} updates, less that of {BASELINE}, is {gap} nat/token."
    )


def _published(records: Sequence[Record], watched: int) -> str:
    """How far DeepSeek-V3's bias and sequence loss come, and what a bias of their rate has to make up for."""
    early = min(ASKED, watched)
    soon, last = (_excess(records, BASELINE, "default", update, watched) for update in (early, watched))
    offset = estimate(records, arm=BASELINE, metric="score_offset", router="collapsed", watched=watched)
    return (
        f"DeepSeek-V3's design, a sign bias at rate {RATE:g} with the sequence loss, is at {soon} times chance after "
        f"{early} updates and {last} after {watched} updates: the collapse raised the scores of its experts by "
        f"{offset} in the mean, and a bias that falls by {RATE:g} an update there and rises as much elsewhere needs "
        f"{offset.map(lambda score: score / (2 * RATE))} updates to make up for that."
    )


def _dead(found: Iterable[Found], records: Sequence[Record], watched: int) -> str:
    """Which methods leave experts without a token in a batch at the end, one of a layer or more in the mean."""
    dead = {one: _at(records, one.arm, one.strength, "dead_experts", watched, updates=watched) for one in found}
    left = sorted((one for one in dead if dead[one].value >= 1.0), key=lambda one: -dead[one].value)
    if not left:
        return f"After {watched} updates no method leaves one expert a layer, in the mean, without a token in a batch."
    told = ", ".join(f"{_named(one)} ({dead[one]})" for one in left)
    return f"After {watched} updates one expert a layer or more, in the mean, has no token in a batch with {told}."


def _found(records: Sequence[Record], arm: str, strengths: Iterable[str], watched: int) -> Iterable[Found]:
    for strength in strengths:
        with suppress(NoEvidence):  # not run yet, or diverged
            share = _at(records, arm, strength, "recovered_share", watched)
            yield Found(arm, strength, share, tuple(_after(records, arm, strength, watched)))


def _after(records: Sequence[Record], arm: str, strength: str, watched: int) -> list[float]:
    with suppress(NoEvidence):  # where none recovered
        rows = replicates(records, arm=arm, metric="recovery_steps", strength=strength, watched=watched)
        return [float(row.value or 0.0) for row in rows.values()]
    return []


def _excess(records: Sequence[Record], arm: str, strength: str, update: int, watched: int) -> Estimate:
    return _at(records, arm, strength, "excess_max_vio", watched, updates=update)


def _less(
    records: Sequence[Record], metric: str, ours: tuple[str, str], theirs: tuple[str, str], watched: int
) -> Estimate:
    """A figure of one method, at its strength, minus another's, by seed."""
    mine, other = (
        replicates(records, arm=arm, metric=metric, strength=strength, watched=watched)
        for arm, strength in (ours, theirs)
    )
    return mean([float(a.value or 0.0) - float(b.value or 0.0) for a, b in matched(mine, other)])


def _at(records: Sequence[Record], arm: str, strength: str, metric: str, watched: int, **where: Value) -> Estimate:
    return estimate(records, arm=arm, metric=metric, strength=strength, watched=watched, **where)


def _named(one: Found) -> str:
    """The method, which records have chosen, and its strength where that is not the default."""
    name = one.arm if one.strength == "default" else f"{one.arm} at {one.strength}"
    return mark(name, sources_of(one.share.value))


def _names(found: Sequence[Found]) -> str:
    return ", ".join(map(_named, found)) or "no method"


def _listed(found: Sequence[Found], records: Sequence[Record], watched: int) -> str:
    """Methods under which all trainings recover, with the mean number of updates, the fastest first."""
    ordered = sorted(found, key=lambda one: sum(one.after))
    told = (f"{_named(one)} ({_at(records, one.arm, one.strength, 'recovery_steps', watched)})" for one in ordered)
    return ", ".join(told) or "no method"


def _shares(found: Sequence[Found]) -> str:
    told = (f"{_named(one)} ({one.share.map(lambda share: 100 * share)}%)" for one in found)
    return ", ".join(told) or "no method"


def _watched(records: Sequence[Record]) -> int:
    watched = [int(record.axes["watched"]) for record in records if "watched" in record.axes]
    if not watched:
        raise NoEvidence("no training has gone on from a collapse")
    return max(watched)
