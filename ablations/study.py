"""A study, declared as data: its question, arms, metrics, and the rule of verdict, written before the first run.

A study is one file of this folder, named after the room it asks about, that defines `STUDY`. Importing it must not
import torch; `measure` does so inside, because it runs in a fresh process per cell. The whole of a study, in small:

    SEEDS = {"quick": 2, "full": 6}

    def cells(profile: Profile) -> tuple[Cell, ...]:
        lengths = {"quick": (1024, 4096), "full": (1024, 4096, 16384)}[profile]
        # One process runs all arms, interleaved; with arms=("dense", "window") each arm has a process of its own.
        return grid(seeds=range(SEEDS[profile]), seconds=20, length=lengths)

    def measure(cell: Cell) -> list[Reading]:
        import torch
        ...
        return [
            Reading(arm="window", measurement=Measurement(metric="peak_bytes", value=1234)),
            Reading(arm="per_head", metric="peak_bytes", failed="gradient differs from the reference by 0.3"),
        ]

    def memory_falls(claim: Claim, records: Sequence[Record]) -> Verdict:
        ratio = compare(records, arm="per_head", baseline="dense", metric="peak_bytes", ratio=True, length=16384)
        saved = ratio.map(lambda share: 1 - share)
        return decide(saved, f"At 16K tokens it saves {saved} of the bytes.", at_least=claim.least)

    STUDY = Study(
        name="attention_sparsity",
        question="From which length does sparse attention pay?",
        arms=(
            Arm("dense", "every visible key"),
            Arm("window", "the last 256 keys"),
            Arm("per_head", "each head its top 30%", config=presets.article_small()),  # where a config defines the arm
        ),
        baseline="dense",
        metrics=("forward_cpu_ratio", "peak_bytes"),  # rows of bench/metrics.py
        seeds=SEEDS,
        cells=cells,
        measure=measure,
        rules=(Rule("A2", seeds=0, judge=memory_falls),),  # the words of A2 stand in claims.toml
        figures=(Figure("time", "Time against dense attention", metric="forward_cpu_ratio", x="length", log="xy"),),
        limits=("One layer, batch 1: a model's other layers dilute the effect.",),
    )

Arms that combine factors come from a design (ablations/designs.py): with `DESIGN = factorial(base, Factor(...), ...)`
say `arms=DESIGN.arms, baseline=BASELINE, design=DESIGN`, and the page has a table of the effects on every metric that
is compared. moe_factorial.py is such a study.

Then add the name to `STUDIES` in ablations/__init__.py; a study that is not there is run by its path. Whatever a cell
depends on stands in its arm, seed or axes (a number of steps too): the axes identify the point in every table. A seed
is also the replicate: of a timing, the number of the fresh process.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from ablations.claims import Claim, Verdict, ledger
from ablations.code import definitions_reached
from ablations.comparison import Compared
from bench.measurement import Measurement
from bench.metrics import metric
from bench.record import Profile, Record
from bench.syntax import dump
from dsv3.config import Config
from dsv3.config.rules import require

if TYPE_CHECKING:
    from ablations.designs import Design

Value = str | int | float


@dataclass(frozen=True)
class Arm:
    """One of the things compared: its name, what it changes against the baseline in words, and its config where one
    defines it.
    """

    name: str
    changes: str
    config: Any = None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What runs in one fresh process: one arm, or (arm None) all arms interleaved, at one seed and one point of the
    axes.

    seconds     what it is expected to take on an idle machine; the runner gives up after many times that
    timed       whether it measures time, which a neighbour would stand in: it then runs alone
    """

    arm: str | None
    seed: int | None
    axes: Mapping[str, Value]
    seconds: float
    timed: bool = True
    device: str = "cpu"


def grid(
    *,
    seconds: float,
    timed: bool = True,
    arms: Iterable[str] | None = None,
    seeds: Iterable[int] | None = None,
    **axes: Iterable[Value],
) -> tuple[Cell, ...]:
    """Every combination of arms, axes and seeds as cells; without `arms` a cell runs them all, without `seeds` it has
    none.

    The seed moves slowest, so that a grid cut short has whole replicates. A grid with gaps is a sum of grids.
    """
    points = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    return tuple(
        Cell(arm=arm, seed=seed, axes=point, seconds=seconds, timed=timed)
        for seed in ((None,) if seeds is None else seeds)
        for point in points
        for arm in ((None,) if arms is None else arms)
    )


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a cell found of one arm: a measurement, or why there is none.

    failed    the arm did not do its work: its check against the reference failed, it ran out of memory. An error
              record; the run exits 1.
    pending   this machine cannot measure it (no GPU, no compiler): says what is missing. An error record, but no
              failure.
    axes      what identifies the point beside the cell's own axes, such as {"layer": 3}
    config    digest of the config that ran, where it is not that of the arm
    corpus    digest of the text that was read, where one was
    """

    arm: str
    measurement: Measurement | None = None
    metric: str = ""
    failed: str | None = None
    pending: str | None = None
    axes: Mapping[str, Value] = field(default_factory=dict)
    config: str | None = None
    corpus: str | None = None

    def __post_init__(self) -> None:
        given = [part for part in (self.measurement, self.failed, self.pending) if part is not None]
        assert len(given) == 1, f"{self!r}: a reading is a measurement, or failed, or pending"
        if self.measurement is None:
            metric(self.metric)


Judge = Callable[[Claim, Sequence[Record]], Verdict]


@dataclass(frozen=True)
class Rule:
    """How records decide a claim. The words (estimand, scope, margin) stand in claims.toml under the claim's id.

    seeds   replicates without which there is no verdict; 0 where the metric is exact. One paired comparison at 0.05
            needs 6.
    judge   the decision, given the claim and the records of this study under this very rule; `NoEvidence` from it means
            pending
    """

    claim: str
    seeds: int
    judge: Judge

    def text(self) -> str:
        """What the verdict depends on, as text: the words, the number of seeds, and the code of the decision as far as
        it stands in the study's own file. What that code imports (`ablations.evidence`) is no part of it, nor are the
        margins of `compared`: the table of each comparison bears a digest of its own.
        """
        claim = ledger()[self.claim]
        words = (claim.id, claim.value, claim.unit, claim.estimand, claim.scope, claim.margin)
        return json.dumps([*words, self.seeds, *map(dump, definitions_reached(self.judge))])


@dataclass(frozen=True)
class Figure:
    """A picture of the study, as data. `line`: the metric against the axis `x`. `interval`: one row per arm, no axis
    needed.

    metric     what is drawn; with `against_baseline`, its paired difference from the baseline arm
    where      axes that select the points: {"profile": "late"}; the rest must leave one point per arm and x
    log        axes on a logarithmic scale: "", "x", "y" or "xy"
    reference  a value marked in the picture and what it is: (2.3, "claimed: 2.3x")
    draw       for any other picture: makes a matplotlib Figure of the study's summary frame; torch-free. With
               `against_baseline` the frame also has the paired differences, as metric "change in ..."
    """

    name: str
    caption: str
    metric: str = ""
    kind: Literal["line", "interval"] = "line"
    x: str | None = None
    where: Mapping[str, Value] = field(default_factory=dict)
    against_baseline: bool = False
    log: Literal["", "x", "y", "xy"] = ""
    reference: tuple[float, str] | None = None
    draw: Callable[[Any], Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question and how it is answered; see the head of this file for an example.

    configs   by arm, the whole run of the full profile, where it is more than the arm's own config says; shown as what
              the arm changes, and no part of what names a cell
    compared  metrics on which every arm is tested against the baseline, with the margin that would not matter
    design    which of the arms combine which levels of which factors, where they do
    metrics   names in bench/metrics.py, in the order of the page; a reading of another metric is an error
    untabled  those of them that a picture shows and that no table lists, having hundreds of points
    seeds     replicates per profile; "full" has at least what the rules ask
    answer    the sentence at the head of the page, with its numbers, from the records; without it, the rules' answers
    limits    what the answer does not say, one sentence each
    """

    name: str
    question: str
    arms: tuple[Arm, ...]
    baseline: str
    metrics: tuple[str, ...]
    seeds: Mapping[Profile, int]
    cells: Callable[[Profile], tuple[Cell, ...]]
    measure: Callable[[Cell], list[Reading]]
    rules: tuple[Rule, ...] = ()
    figures: tuple[Figure, ...] = ()
    answer: Callable[[Sequence[Record]], str] | None = None
    limits: tuple[str, ...] = ()
    configs: Mapping[str, Config] = field(default_factory=dict)
    compared: tuple[Compared, ...] = ()
    untabled: tuple[str, ...] = ()
    design: "Design | None" = None

    def __post_init__(self) -> None:
        names = tuple(arm.name for arm in self.arms)
        require(len(set(names)) == len(names), "arms", names, "must have distinct names", "rename one of each pair")
        require(self.baseline in names, "baseline", self.baseline, f"must be one of {', '.join(names)}", "name an arm")
        strangers = sorted(set(self.configs) - set(names))
        require(not strangers, "configs", strangers, f"must be of the arms {', '.join(names)}", "name arms")
        require(set(self.seeds) == {"quick", "full"}, "seeds", dict(self.seeds), "must have quick and full", "add it")
        for name in (*self.metrics, *(figure.metric for figure in self.figures if figure.draw is None)):
            metric(name)
        strangers = sorted(set(self.untabled) - set(self.metrics))
        require(not strangers, "untabled", strangers, f"must be of {', '.join(self.metrics)}", "declare them there")
        self._check_compared()
        for rule in self.rules:
            known = ledger()
            require(
                rule.claim in known, "claim", rule.claim, f"must be one of {', '.join(known)}", "add it to claims.toml"
            )
            most = self.seeds["full"]
            require(
                rule.seeds <= most, "seeds", rule.seeds, f"must be at most the full profile's {most}", "declare more"
            )

    def _check_compared(self) -> None:
        most = self.seeds["full"]
        require(not self.compared or most > 1, "seeds", most, "must be at least 2 to compare arms", "declare more")
        names = [arm.name for arm in self.arms]
        for compared in self.compared:
            against = compared.baseline or self.baseline
            rule = f"must be one of {', '.join(names)}"
            require(against in names, "compared.baseline", against, rule, "name an arm, or none for the study's own")
            there = compared.metric in self.metrics
            require(there, "compared", compared.metric, f"must be one of {', '.join(self.metrics)}", "declare it there")
            others = [name for name in names if name != against]
            strangers = [arm for arm in compared.arms if arm not in others]
            require(not strangers, "compared.arms", strangers, f"must be of {', '.join(others)}", "name arms")
        strangers = [arm.name for arm in self.design.arms if arm not in self.arms] if self.design else []
        require(not strangers, "design", strangers, "must have arms of the study", "pass arms=design.arms")

    def arm(self, name: str) -> Arm:
        """The arm of that name.

        Raises:
            ValueError: for a name that is no arm of this study.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise ValueError(f"arm={name!r}: must be one of {', '.join(arm.name for arm in self.arms)}; in {self.name}")

    def config(self, name: str) -> Config | None:
        """What the arm of that name trains: the one in `configs`, or its own; None where no config defines it.

        Raises:
            ValueError: for a name that is no arm of this study.
        """
        return self.configs.get(name, self.arm(name).config)

    def rule_digest(self) -> str | None:
        """Twelve hexadecimal digits that name all rules of the study together; None without rules. Part of every
        record.
        """
        if not self.rules:
            return None
        return sha256("\n".join(rule.text() for rule in self.rules).encode()).hexdigest()[:12]
