"""What each page says, as values: the templates only lay it out.

A study's page: question, answer, figures, verdicts, tables, what failed, limits, how to do it again, where it comes
from. A benchmark file whose cases left records has the same page without a question, and so have records of a study
that the report was not given. The ledger's page has every claim.
"""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ablations import STUDIES
from ablations.catalogue import typed
from ablations.claims import Claim, Outcome, Verdict, ledger
from ablations.code import ROOT
from ablations.evidence import NoEvidence
from ablations.study import Study
from ablations.traced import Prose, mark, tracing
from ablations.verdicts import current, mixed, standing, verdicts
from bench.machines import other_machines, speaking
from bench.metrics import METRICS, Metric, metric
from bench.record import Profile, Record
from reports import figures, inlined
from reports.baseline import against_baseline
from reports.frame import axes_of, summary
from reports.implementations import implementations
from reports.numbers import interval, number, place, spelt
from reports.references import Declared, declared
from reports.tables import Table, failures, results, title
from reports.tuned import chosen

MARKS = {
    Outcome.HOLDS: "holds",
    Outcome.FAILS: "fails",
    Outcome.ILL_POSED: "posed",
    Outcome.UNDECIDABLE: "open",
    Outcome.PENDING: "pending",
}


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure of a page: its files, the picture as it stands there (`titled` when it says its caption) and its twin,
    the same numbers as tables.
    """

    name: str
    caption: str
    titled: bool
    files: Mapping[str, bytes]
    inline: str
    twin: tuple[Table, ...]


@dataclass(frozen=True, kw_only=True)
class Ruling:
    """A claim with its verdict, as a row: `mark` is the verdict's name in the style sheet, `claimed` and `margin` are
    text.
    """

    claim: Claim
    verdict: Verdict
    mark: str
    claimed: str
    margin: str

    @property
    def words(self) -> tuple[str, ...]:
        """What the ledger says, written before any measurement."""
        claim = self.claim
        said = (claim.words, claim.estimand, claim.scope, claim.why, claim.pending, self.claimed, self.margin)
        return tuple(filter(None, said))


@dataclass(frozen=True, kw_only=True)
class Page:
    """One study or benchmark file.

    answers   sentences whose numbers are references or declared; `declared` are the numbers set before measuring
    aside     what the file holds that does not speak here
    origin    facts about where the figures come from, name by name
    """

    name: str
    title: str
    question: str
    answers: tuple[str, ...]
    warning: str
    arms: tuple[tuple[str, str], ...]
    baseline: str
    figures: tuple[Drawn, ...]
    rulings: tuple[Ruling, ...]
    tables: tuple[Table, ...]
    failures: Table | None
    limits: tuple[str, ...]
    metrics: tuple[Metric, ...]
    commands: tuple[str, ...]
    origin: tuple[tuple[str, str], ...]
    aside: str = ""
    declared: Declared = field(default_factory=Declared)

    @property
    def words(self) -> tuple[str, ...]:
        """What the page says before any measurement, written by hand."""
        arms = (word for arm in self.arms for word in arm)
        return (self.question, *arms, *self.limits, *(figure.caption for figure in self.figures))


def study_page(study: Study, records: Sequence[Record], found: Mapping[str, Verdict]) -> Page:
    """The page of a study; one without records says so."""
    rows = standing(study, records)
    claims = ledger()
    used = {record.metric for record in rows}
    again = f"python -m ablations run {typed(study)} --profile {_profile(rows)}"
    arms = [arm.name for arm in study.arms]
    tabled = [name for name in study.metrics if name not in study.untabled]
    return Page(
        name=study.name,
        title=spelt(study.name),
        question=study.question,
        answers=_answers(study, rows, [found[rule.claim] for rule in study.rules]),
        warning=_warning(study, rows),
        arms=tuple((arm.name, arm.changes) for arm in study.arms),
        baseline=study.baseline,
        # Of a study that has not run the answer says so once; as many sheets that say it again hide the rest.
        figures=tuple(_drawn(study, figure, rows) for figure in study.figures if rows),
        rulings=tuple(ruling(claims[rule.claim], found[rule.claim]) for rule in study.rules),
        tables=(*against_baseline(study, rows), *chosen(rows), *results(rows, tabled, arms)),
        failures=failures(rows),
        limits=study.limits,
        metrics=tuple(row for row in METRICS if row.name in used),
        commands=(again, "python -m reports build" + ("" if study.name in STUDIES else f" --study {typed(study)}")),
        origin=_origin(rows, study.rule_digest()),
        aside=other_machines([record for record in records if record.study == study.name]),
        declared=declared(study, rows),
    )


def bench_page(name: str, records: Sequence[Record]) -> Page:
    """The page of a benchmark file: its cases' figures without a verdict."""
    room = name.removeprefix("bench_")
    measure = f"python -m bench {room} --profile {_profile(records)}"
    commands = (measure, "python -m reports build")
    return _bare(name, records, title=f"{spelt(room)} benchmark", question=_opening(name), commands=commands)


def stranger_page(name: str, records: Sequence[Record]) -> Page:
    """The page of a study that the report was not given: its figures, and how to have the rest."""
    ours = Path("ablations", f"{name}.py")
    path = ours.as_posix() if (ROOT / ours).is_file() else f"PATH/{name}.py"
    warning = (
        "These records name a study that this report was not given: here are its figures, without question, tests or "
        "verdict. Build again with the file of the study, as said below."
    )
    commands = (f"python -m reports build --study {path}",)
    said = f"No study of this report is named {name}."
    return _bare(name, records, title=spelt(name), question=said, commands=commands, warning=warning)


def _bare(
    name: str, records: Sequence[Record], *, title: str, question: str, commands: tuple[str, ...], warning: str = ""
) -> Page:
    """What records say by themselves, those that speak, each point once."""
    rows = list({(r.arm, r.seed, r.metric, tuple(sorted(r.axes.items()))): r for r in speaking(records)}.values())
    used = tuple(dict.fromkeys(record.metric for record in rows))
    arms = tuple(dict.fromkeys(record.arm for record in rows))
    baselines = ", ".join(dict.fromkeys(record.baseline for record in rows if record.baseline))
    return Page(
        name=name,
        title=title,
        question=question,
        answers=(),
        warning=warning,
        arms=tuple((arm, "") for arm in arms),
        baseline=baselines,
        figures=(),
        rulings=(),
        tables=tuple(results(rows, used, arms)),
        failures=failures(rows),
        limits=(),
        metrics=tuple(row for row in METRICS if row.name in used),
        commands=commands,
        origin=_origin(rows, None),
        aside=other_machines(records),
    )


def ruling(claim: Claim, verdict: Verdict) -> Ruling:
    """A claim with its verdict, its numbers as text."""
    claimed = "" if claim.value is None else number(claim.value, claim.unit)
    if claimed and claim.unit not in ("share", "ratio"):
        claimed = f"{claimed} {claim.unit}"
    margin = "" if claim.margin is None else number(claim.margin, claim.unit)
    return Ruling(claim=claim, verdict=verdict, mark=MARKS[verdict.outcome], claimed=claimed, margin=margin)


def rulings(studies: Sequence[Study], records: Sequence[Record]) -> tuple[Ruling, ...]:
    """Every claim of the ledger with its verdict."""
    found = verdicts(studies, records)
    return tuple(ruling(claim, found[claim.id]) for claim in ledger().values())


def _answers(study: Study, rows: Sequence[Record], found: Sequence[Verdict]) -> tuple[str, ...]:
    """The study's own sentence, else those of its verdicts; what it compares first, at the last place, while some are
    pending.
    """
    if not any(record.error is None for record in rows):
        return ("Pending: no cell could be measured; see why below." if rows else "Pending: not run yet.",)
    if not any(record.error is None for record in current(study, rows)):
        return ("Pending: the rule of verdict was changed after these records; run again.", _headline(study, rows))
    if study.answer is not None:
        try:
            with tracing(current(study, rows)) as traced:
                return (Prose.of(study.answer(traced)),)
        except NoEvidence as missing:
            return (f"Pending: {missing}.", _headline(study, rows))
    said = tuple(verdict.answer for verdict in found if verdict.outcome is not Outcome.PENDING)
    return said if said and len(said) == len(found) else (*said, _headline(study, rows))


def _headline(study: Study, rows: Sequence[Record]) -> Prose:
    points, name = _first_compared(study, summary(rows))
    varying = [axis for axis in axes_of(points) if points[axis].nunique(dropna=False) > 1]
    last = points.sort_values(varying, kind="stable").iloc[-1] if varying else points.iloc[-1]
    there = points[(points[varying] == last[varying]).all(axis=1)]
    unit = metric(name).unit
    said = [(row, interval(row["value"], row["low"], row["high"], unit)) for _, row in there.iterrows()]
    told = ", ".join(f"{row['arm']} {mark(text, row['records'])}" for row, text in said)
    where = "".join(f" at {axis} {place(last[axis])}" for axis in varying)
    what = title(name)
    return Prose.of(f"{what[0].upper()}{what[1:]}{where}: {told}.")


def _first_compared(study: Study, points: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The points of what the study compares first, or, where there are none, of its first metric."""
    for compared in study.compared[:1]:
        found = points[points["metric"] == compared.metric]
        for axis, value in compared.where.items():
            found = found[found[axis] == value] if axis in found else found.iloc[:0]
        if not found.empty:
            return found, compared.metric
    name = next(name for name in study.metrics if name in set(points["metric"]))
    return points[points["metric"] == name], name


def _warning(study: Study, rows: Sequence[Record]) -> str:
    """What a reader must know before believing a number: few seeds, an older rule, records renewed in part."""
    measured = [record for record in rows if record.error is None]
    if not measured:
        return ""
    said = []
    if {record.profile for record in measured} == {"quick"} and study.cells("quick") != study.cells("full"):
        fewer = f"{study.seeds['quick']} of the {study.seeds['full']} seeds"
        said.append(
            f"Quick profile: small sizes, {fewer} that the full profile takes. Intervals are wide or missing, and"
            " claims whose rule asks for more get no verdict here."
        )
    if len(current(study, measured)) < len(measured):
        said.append("Some records are of an older rule of verdict: exploratory, shown here, and decide nothing.")
    return " ".join(filter(None, (*said, mixed(measured, study.baseline))))


def _drawn(study: Study, figure: Any, rows: Sequence[Record]) -> Drawn:
    name = f"{study.name}-{figure.name}"
    picture, twin = figures.draw(study, figure, rows)
    files = figures.render(picture, name, figures.provenance(study.name, figure.name, rows))
    inline = inlined.inline(files["svg"], name, figure.caption, twin=bool(twin))
    titled = figure.draw is None
    return Drawn(name=name, caption=figure.caption, titled=titled, files=files, inline=inline, twin=tuple(twin))


def _profile(rows: Sequence[Record]) -> Profile:
    return "full" if any(record.profile == "full" for record in rows) else "quick"


def _origin(rows: Sequence[Record], rule: str | None) -> tuple[tuple[str, str], ...]:
    if not rows:
        return ()
    times = sorted(record.time for record in rows)

    def listed(name: str) -> str:
        values = sorted({str(getattr(record, name)) for record in rows if getattr(record, name) is not None})
        return ", ".join(values) or "none"

    computed = implementations(rows)
    return (
        ("records", str(len(rows))),
        ("measured", times[0] if times[0] == times[-1] else f"{times[0]} to {times[-1]}"),
        ("profile", listed("profile")),
        ("machine", listed("machine")),
        ("revision", listed("revision")),
        ("corpus", listed("corpus")),
        *((("attention computed by", computed),) if computed else ()),
        ("rule of verdict", listed("rule") + (f" (now {rule})" if rule and listed("rule") != rule else "")),
    )


def _opening(name: str) -> str:
    """The first sentence of a benchmark file, which says what its cases compare."""
    path = ROOT / "bench" / f"{name}.py"
    text = ast.get_docstring(ast.parse(path.read_text())) if path.is_file() else None
    return " ".join((text or "").split("\n\n")[0].split())
