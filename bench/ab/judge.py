"""What the blocks of a run say: verdicts on the cases, the run's own false alarms and power, whether to believe them.

A run that calls the base different from itself has shown that its machine, that hour, breaks what the verdicts rest on:
all of them are withdrawn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from bench.ab.block import Block
from bench.ab.decide import Rate, Ratios, Verdict, alarms, decide, found
from bench.ab.recording import ratios, unable
from bench.ab.turns import ARMS, SLOWED

SAME, SLOWER, REFUSED, UNKNOWN, WITHDRAWN, FASTER, FAILED = range(7)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What is known after some blocks.

    cases       verdicts on the cases that the base can serve; a head that cannot leaves no blocks to judge
    unable      why the others are not comparable
    control     the verdicts of the same procedure on the base against itself
    alarms      how many of these are false alarms
    power       by injected slow-down: how much it was, and how many were found
    """

    cases: Mapping[str, Verdict]
    unable: Mapping[str, str]
    control: Mapping[str, Verdict]
    alarms: Rate
    power: Mapping[str, tuple[float, Rate]]

    @property
    def withdrawn(self) -> bool:
        """Whether the control failed."""
        return self.alarms.happened > 0

    @property
    def code(self) -> int:
        """The exit code."""
        findings = {verdict.finding for verdict in self.cases.values()}
        if self.withdrawn:
            return WITHDRAWN
        if "slower" in findings:
            return SLOWER
        if "faster" in findings:
            return FASTER
        return SAME if "same" in findings else UNKNOWN


def judge(blocks: Sequence[Block]) -> Judgement:
    """Everything that these blocks say."""
    series = {arm: ratios(blocks, arm) for arm in (*ARMS, *SLOWED)}
    control = series["control"]
    return Judgement(
        cases=decide(series["head"]),
        unable=unable(blocks),
        control=decide(control),
        alarms=alarms(control),
        power={arm: (added(control, series[arm]), found(control, series[arm])) for arm in SLOWED},
    )


def added(control: Ratios, slowed: Ratios) -> float:
    """How much more work a slow-down was, over all cases and blocks: beside the control it has hardly any noise."""
    shares = [more / own for name in control for more, own in zip(slowed[name], control[name], strict=True)]
    return geometric_mean(shares) - 1 if shares else 0.0
