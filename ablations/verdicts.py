"""The verdict on every claim, from the records that are there.

What may speak: each point once (the newest), times of one machine, counts and losses of any (`bench.machines`),
measured under the rules as they stand now; those of an older rule are exploratory. There is no verdict with fewer
replicates than the rule declares.

An answer is plain text that knows which records each of its numbers comes from (`ablations.traced.Prose`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ablations.cell import PENDING
from ablations.claims import Claim, Outcome, Verdict, ledger
from ablations.evidence import NoEvidence
from ablations.study import Rule, Study
from ablations.traced import Count, Prose, mark, tracing
from bench.machines import speaking
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
    """The study's records that stand: of those that speak, the newest of each point, in file order.

    An error stands until something of its arm and seed is measured where it failed.
    """
    ours = speaking([record for record in records if record.study == study.name])
    points: dict[tuple[object, ...], Record] = {}
    errors: dict[tuple[object, ...], set[tuple[object, ...]]] = {}  # of an arm and seed, those that stand
    for row in ours:
        key = (row.arm, row.seed, *_place(row), row.error is None)
        failed = errors.setdefault((row.arm, row.seed), set())
        if row.error is None:
            for repaired in [old for old in failed if points[old].axes.items() <= row.axes.items()]:
                failed.remove(repaired)
                del points[repaired]
        else:
            failed.add(key)
        points.pop(key, None)
        points[key] = row
    return tuple(points.values())


def current(study: Study, records: Iterable[Record]) -> tuple[Record, ...]:
    """The records among them that were measured under the study's rules as they stand now."""
    digest = study.rule_digest()
    return tuple(record for record in records if record.rule == digest)


def mixed(records: Sequence[Record], baseline: str) -> str:
    """Which means and pairs are of records that differ in more than their seed or arm, as when only some cells were
    run again; "" where none are.
    """
    means = dict[tuple[object, ...], list[Record]]()
    for row in records:
        means.setdefault((row.arm, *_place(row)), []).append(row)
    against = {(row.seed, *_place(row)): row for row in records if row.arm == baseline}
    others = [row for row in records if row.arm != baseline and (row.seed, *_place(row)) in against]
    pairs = [(row, against[row.seed, *_place(row)]) for row in others]
    said = [
        _several(means.values(), "config", "points average records of several configs"),
        _several(means.values(), "revision", "points average records of several revisions"),
        _several(means.values(), "corpus", "points average records of several texts"),
        _several(means.values(), "machine", "points average records of several machines"),
        _several(pairs, "revision", f"pairs with {baseline} are of two revisions"),
        _several(pairs, "machine", f"pairs with {baseline} are of two machines"),
        _several(pairs, "corpus", f"pairs with {baseline} are of two texts and left out"),
    ]
    return " ".join(filter(None, said))


def _place(record: Record) -> tuple[object, ...]:
    return record.metric, tuple(sorted(record.axes.items()))


def _several(groups: Iterable[Sequence[Record]], part: str, what: str) -> str:
    found = [len({getattr(row, part) for row in rows}) > 1 for rows in groups]
    return f"{'All' if all(found) else 'Some'} {what}." if any(found) else ""


def _judge(claim: Claim, study: Study, rule: Rule, records: Sequence[Record]) -> Verdict:
    rows = [record for record in current(study, records) if record.error is None]
    if not rows:
        return _pending(f"{_missing(study, records)}: python -m ablations run {study.name} --profile full")
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


def _missing(study: Study, records: Sequence[Record]) -> str:
    """Why no figure may speak, among records that stand."""
    lost = current(study, records)
    if lost:
        failed = [row for row in lost if not str(row.error).startswith(PENDING)]
        first = (failed or lost)[0]
        why = mark(str(first.error).removeprefix(PENDING), (first.id,))
        return f"every cell failed, first: {why}" if failed else f"cannot be measured here ({why})"
    return "its records are of an older rule, exploratory" if records else "not run yet"


def _plain(found: Verdict) -> Verdict:
    """The verdict in plain numbers; what traced them stays with the answer."""
    value, low, high = (None if part is None else float(part) for part in (found.value, found.low, found.high))
    return replace(found, answer=Prose.of(found.answer), value=value, low=low, high=high, n=int(found.n))


def _pending(why: str) -> Verdict:
    return Verdict(outcome=Outcome.PENDING, answer=Prose.of(why))
