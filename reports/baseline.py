"""Tables of a study that set every arm against its baseline: what it changes, whether what it did differs, and where
the arms come from a design what each factor did.
"""

from collections.abc import Iterable, Sequence

from ablations.comparison import Comparison, Family, families
from ablations.designs import Design, Effect, effects
from ablations.difference import Difference, Quantity, differences
from ablations.evidence import Estimate, NoEvidence, seeds_needed
from ablations.significance import ALPHA, MOST, POWER, Judged, flips_decide
from ablations.study import Study
from ablations.traced import Prose, mark
from ablations.verdicts import current
from bench.metrics import metric
from bench.record import Record
from reports.numbers import interval, number, place
from reports.tables import MISSING, Table, title


def against_baseline(study: Study, records: Sequence[Record]) -> list[Table]:
    """What each arm changes, where configs define arms; then for every metric that the study compares, at each point,
    a table of tests of the arms, and of the effects of a design.

    `records` are those that stand; only those under the rule of verdict as it stands now are tested.
    """
    found = differences(study)
    tables = [_changes(study.baseline, found)] if any(row.configured for row in found) else []
    rows = current(study, records)
    arms = [arm.name for arm in study.arms]
    for family in families(rows, study.compared, arms=arms, baseline=study.baseline, seeds=study.seeds["full"]):
        tables.append(_tests(family))
        if study.design is not None and study.design.crossed and _compares(family, study.design):
            tables.append(_effects(family, study.design, rows))
    return tables


def _compares(family: Family, design: Design) -> bool:
    return {arm.name for arm in design.arms} <= {family.baseline, *family.arms}


def _changes(baseline: str, found: tuple[Difference, ...]) -> Table:
    rows = tuple((row.arm, _changed(row), ", ".join(_unmatched(row)) or MISSING) for row in found)
    return Table(
        caption=f"What each arm changes against {baseline}",
        note="by the configs of the full profile; not matched: off by more than 1%",
        head=("arm", "field: old -> new", "not matched"),
        rows=rows,
        texts=3,
    )


def _changed(row: Difference) -> str:
    if not row.configured:
        return f"no config: {row.words}"
    return "; ".join(map(str, row.changes)) or "nothing in the config"


def _unmatched(row: Difference) -> tuple[str, ...]:
    return *map(_ratio, row.unmatched), *row.unsettled


def _ratio(quantity: Quantity) -> str:
    old, new = (number(value, quantity.unit) for value in (quantity.old, quantity.new))
    return f"{quantity.name} {quantity.ratio:.3g}x ({old} -> {new})"


def _tests(family: Family) -> Table:
    declared, m, seeds = family.compared, len(family.arms), family.seeds
    unit = metric(declared.metric).unit
    return Table(
        caption=f"{title(declared.metric)} minus {family.baseline}'s, by seed ({_where(family)})",
        note=f"{_decides(m, seeds)}; p TOST: that the difference is beyond +-{declared.margin:g} ({declared.why}), by "
        f"t tests, Holm likewise; declared as {family.digest()}",
        head=("arm", "difference [95%, t]", "[95%, exact]", *_heads(m, seeds), "p TOST", "verdict"),
        rows=tuple(_tested(row, unit) for row in family.rows),
    )


def _tested(row: Comparison, unit: str) -> tuple[str, ...]:
    exact = MISSING if row.interval is None else f"[{number(row.interval[0], unit)}, {number(row.interval[1], unit)}]"
    difference = MISSING if row.difference is None else f"{_interval(row.difference, unit)} (n={row.difference.n})"
    cells = (difference, exact, *_judged(row.judged, unit), _chance(row.equivalent))
    return row.arm, *_traced(cells, row.records), row.verdict


def _effects(family: Family, design: Design, records: Sequence[Record]) -> Table:
    declared, seeds = family.compared, family.seeds
    there = [row for row in records if row.axes == family.axes]
    try:
        found, pending = effects(there, design, declared.metric, seeds=seeds), ""
    except NoEvidence as missing:
        found, pending = (), f"; pending: {missing}"
    m = len(design.told_apart())
    levels = "; ".join(f"{factor.name}: {' -> '.join(factor.levels)}" for factor in design.factors)
    return Table(
        caption=f"{title(declared.metric)}: effects of the factors, by seed ({_where(family)})",
        note=f"{levels}; mean of the arms at the second level minus that at the first; of two factors half of what one "
        f"adds to the effect of the other; {_decides(m, seeds)}{pending}",
        head=("effect", "change [95%, t]", *_heads(m, seeds), "n", "aliases", "verdict"),
        rows=tuple(_effect(row, metric(declared.metric).unit) for row in found),
    )


def _effect(row: Effect, unit: str) -> tuple[str, ...]:
    cells = (_interval(row.found, unit), *_judged(row.judged, unit), str(row.found.n))
    return row.name, *_traced(cells, row.records), ", ".join(row.aliases) or MISSING, row.verdict


def _decides(m: int, seeds: int) -> str:
    """Which test decides a family of `m` over the declared seeds, and why, in words."""
    if flips_decide(m, seeds):
        test, why = "exact sign-flip", ""
    elif seeds > MOST:
        test, why = "paired t", f", as the signs of {seeds} pairs are too many to try"
    else:
        test, why = (
            "paired t",
            f", as the exact sign-flip test of {m} finds nothing below {seeds_needed(m, ALPHA)} seeds",
        )
    return (
        f"decided by the {test} test (p Holm, for a family of {m}){why}; no verdict before the {seeds} seeds declared; "
        f"detectable: by that test with power {POWER:g} at {ALPHA:g}/{m}"
    )


def _heads(m: int, seeds: int) -> tuple[str, ...]:
    return "p exact", f"p Holm ({'exact' if flips_decide(m, seeds) else 't'})", "detectable"


def _judged(judged: Judged | None, unit: str) -> tuple[str, ...]:
    if judged is None:
        return MISSING, MISSING, MISSING
    return _chance(judged.flipped), _chance(judged.adjusted), number(judged.detectable, unit)


def _chance(p: float | None) -> str:
    return MISSING if p is None else f"{p:.2g}"


def _interval(found: Estimate, unit: str) -> str:
    low, high = (float("nan") if end is None else end for end in (found.low, found.high))
    return interval(found.value, low, high, unit)


def _traced(cells: Iterable[str], records: Iterable[str]) -> tuple[Prose, ...]:
    return tuple(Prose.of(mark(text, records)) for text in cells)


def _where(family: Family) -> str:
    return ", ".join(f"{name} {place(value)}" for name, value in family.axes.items())
