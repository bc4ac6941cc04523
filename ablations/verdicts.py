"""The verdict on every claim, from the records that are there.

What may speak: the records of one machine (that of the study's newest record), each point once (the newest), measured
under the rules as they stand now; those of an older rule are exploratory. There is no verdict with fewer replicates
than the rule declares.

An answer is plain text that knows which records each of its numbers comes from (`ablations.traced.Prose`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ablations.claims import Claim, Outcome, Verdict, ledger
from ablations.evidence import NoEvidence
from ablations.study import Rule, Study
from ablations.traced import Count, Prose, tracing
from bench.record import Record


def verdicts(studies: Iterable[Study], records: Sequence[Record]) -> dict[str, Verdict]:
    """The verdict on every claim of the ledger, by id, in its order."""
    by_name = {study.name: study for study in studies}
    return {claim.id: verdict(claim, by_name, records) for claim in ledger().values()}


def verdict(claim: Claim, studies: Mapping[str, Study], records: Sequence[Record]) -> Verdict:
    """What the records let one say of a claim."""
    if claim.ruled is not None:
        return Verdict(outcome=Outcome(claim.ruled), answer=Prose.of(f"{claim.why}."))
    if claim.study is None:
        return _pending(str(claim.pending))
    if claim.study not in studies:
        return _pending(f"its study, {claim.study}, is not part of this report")
    study = studies[claim.study]
    for rule in study.rules:
        if rule.claim == claim.id:
            return _judge(claim, study, rule, standing(study, records))
    return _pending(f"its study, {claim.study}, has no rule for it")


def standing(study: Study, records: Iterable[Record]) -> tuple[Record, ...]:
    """The study's records that stand: of the newest one's machine, the newest of each point, in file order.

    An error stands until something of its arm and seed is measured where it failed.
    """
    ours = [record for record in records if record.study == study.name]
    ours = [record for record in ours if record.machine == ours[-1].machine]
    points: dict[tuple[object, ...], Record] = {}
    for row in ours:
        if row.error is None:
            points = {key: old for key, old in points.items() if not _repairs(row, old)}
        key = (row.arm, row.seed, row.metric, tuple(sorted(row.axes.items())), row.error is None)
        points.pop(key, None)
        points[key] = row
    return tuple(points.values())


def current(study: Study, records: Iterable[Record]) -> tuple[Record, ...]:
    """The records among them that were measured under the study's rules as they stand now."""
    digest = study.rule_digest()
    return tuple(record for record in records if record.rule == digest)


def _repairs(row: Record, old: Record) -> bool:
    same = old.error is not None and (old.arm, old.seed) == (row.arm, row.seed)
    return same and old.axes.items() <= row.axes.items()


def _judge(claim: Claim, study: Study, rule: Rule, records: Sequence[Record]) -> Verdict:
    rows = [record for record in current(study, records) if record.error is None]
    if not rows:
        why = "its records are of an older rule, exploratory" if records else "not run yet"
        return _pending(f"{why}: python -m ablations run {study.name} --profile full")
    by_seed = {record.seed: record.id for record in rows}
    seeds = Count(len(by_seed), by_seed.values())
    if seeds < rule.seeds:
        return _pending(f"needs the full profile ({seeds} of {rule.seeds} seeds)")
    try:
        with tracing(rows) as traced:
            found = rule.judge(claim, traced)
    except NoEvidence as error:
        return _pending(f"needs the full profile ({error})")
    if found.outcome is not Outcome.PENDING and found.n < rule.seeds:
        return replace(_pending(f"needs the full profile ({found.n} of {rule.seeds} seeds)"), n=int(found.n))
    return _plain(found)


def _plain(found: Verdict) -> Verdict:
    """The verdict in plain numbers; what traced them stays with the answer."""
    value, low, high = (None if part is None else float(part) for part in (found.value, found.low, found.high))
    return replace(found, answer=Prose.of(found.answer), value=value, low=low, high=high, n=int(found.n))


def _pending(why: str) -> Verdict:
    return Verdict(outcome=Outcome.PENDING, answer=Prose.of(why))
