"""A pipeline schedule as a value: who does what, in which order; when it happens is left to those who read it.

A plan is one row of steps per rank, written as torch.distributed.pipelining writes its own schedules:

    2F0     forward of microbatch 0 through stage 2
    2I0     backward of the inputs of stage 2 ("input gradient"): what the stage before it waits for
    2W0     backward of its weights ("weight gradient"): nobody waits for it, so it can fill a gap
    2B0     both at once, first I then W
    (0F8;7B0)OVERLAP_F_B    a forward and a backward of two microbatches that run as one step

What an action needs before it can start follows from its name alone:

    F of stage s    F of stage s - 1
    I of stage s    F of stage s, and I of stage s + 1
    W of stage s    I of stage s

The text form is the compute-only CSV that torch's runtime loads: a line per rank, a cell per step, empty cells ignored.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from dsv3.config.rules import require

Kind = Literal["F", "I", "W", "B"]
Result = tuple[int, Literal["F", "I", "W"], int]  # what a finished action leaves behind: (stage, kind, microbatch)

_ACTION = re.compile(r"(\d+)([FIWB])(\d+)")
_PAIR = re.compile(r"\((\w+);(\w+)\)OVERLAP_F_B")


@dataclass(frozen=True, slots=True)
class Action:
    """One microbatch through one stage: forward, backward of the inputs, of the weights, or of both."""

    stage: int
    kind: Kind
    microbatch: int

    def __post_init__(self) -> None:
        require(self.kind in get_args(Kind), "kind", self.kind, "must be F, I, W or B", "use one of these letters")
        for name in ("stage", "microbatch"):
            value = getattr(self, name)
            require(value >= 0, name, value, "counts from 0", f"give {name} as 0 or more")

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @property
    def actions(self) -> tuple["Action", ...]:
        """Itself: an action and a pair are read alike."""
        return (self,)

    @property
    def results(self) -> tuple[Result, ...]:
        """What later actions may wait for."""
        s, m = self.stage, self.microbatch
        return ((s, "I", m), (s, "W", m)) if self.kind == "B" else ((s, self.kind, m),)

    def needs(self, stages: int) -> tuple[Result, ...]:
        """What must be finished before this action starts, in a pipeline of `stages` stages."""
        s, m = self.stage, self.microbatch
        if self.kind == "F":
            return ((s - 1, "F", m),) if s > 0 else ()
        if self.kind == "W":
            return ((s, "I", m),)
        return ((s, "F", m), (s + 1, "I", m)) if s < stages - 1 else ((s, "F", m),)


@dataclass(frozen=True, slots=True)
class Pair:
    """A forward and a backward that start together and end together (DualPipe's overlapped chunks)."""

    forward: Action
    backward: Action

    def __post_init__(self) -> None:
        kinds = self.forward.kind + self.backward.kind
        require(kinds in ("FB", "FI"), "pair", str(self), "must be a forward and a backward", "write (0F8;7B0)")

    def __str__(self) -> str:
        return f"({self.forward};{self.backward})OVERLAP_F_B"

    @property
    def actions(self) -> tuple[Action, ...]:
        """The forward, then the backward."""
        return (self.forward, self.backward)


Step = Action | Pair
Row = tuple[Step, ...]


@dataclass(frozen=True)
class Plan:
    """A schedule: the stages that each rank holds, and the steps of each rank in order."""

    name: str
    microbatches: int
    placement: tuple[tuple[int, ...], ...]
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        check_counts(microbatches=self.microbatches)
        rule = f"must have one entry per rank, and there are {len(self.rows)} rows"
        require(len(self.placement) == len(self.rows) > 0, "placement", self.placement, rule, "list each rank's stages")
        for rank, (held, row) in enumerate(zip(self.placement, self.rows, strict=True)):
            idle = "leave a rank without work out of the plan"
            require(bool(held) and bool(row), f"rows[{rank}]", row, "needs a stage and at least one step", idle)

    @property
    def ranks(self) -> int:
        """Number of devices."""
        return len(self.rows)

    @property
    def stages(self) -> int:
        """Number of stages that the model is cut into."""
        return 1 + max(stage for held in self.placement for stage in held)

    @property
    def copies(self) -> int:
        """How many ranks hold a stage: 2 for bidirectional schedules, whose weights are stored twice."""
        return sum(len(held) for held in self.placement) // self.stages

    def steps(self) -> Iterator[tuple[int, Step]]:
        """Every (rank, step), rank by rank."""
        return ((rank, step) for rank, row in enumerate(self.rows) for step in row)

    def __str__(self) -> str:
        return "".join(",".join(str(step) for step in row) + "\n" for row in self.rows)


def check_counts(**counts: int) -> None:
    """Each named count, such as ranks or microbatches, is a whole number of at least 1.

    Raises:
        ValueError: names the first that is not.
    """
    for name, value in counts.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        require(whole and value >= 1, name, value, "must be a whole number of at least 1", f"set {name} to 1 or more")


def parse_step(text: str) -> Step:
    """Read one cell, such as `0F1` or `(0F8;7B0)OVERLAP_F_B`.

    Raises:
        ValueError: for anything else.
    """
    if match := _PAIR.fullmatch(text):
        return Pair(_parse_action(match[1]), _parse_action(match[2]))
    return _parse_action(text)


def _parse_action(text: str) -> Action:
    match = _ACTION.fullmatch(text)
    remedy = "write [stage][F|I|W|B][microbatch] as in 2F0, or a pair as in (0F8;7B0)OVERLAP_F_B"
    if match is None:
        raise ValueError(f"action={text!r}: is not an action; {remedy}")
    kind: Kind = match[2]  # type: ignore[assignment]  # the pattern admits these four letters only
    return Action(int(match[1]), kind, int(match[3]))


def parse(text: str, *, name: str, microbatches: int | None = None) -> Plan:
    """Read a plan from its text form; a rank holds the stages that its row names.

    Without `microbatches` there are as many as the text names.

    Raises:
        ValueError: for a cell that is not a step, or a text without any.
    """
    cells = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    rows = tuple(tuple(parse_step(cell) for cell in line if cell) for line in cells)
    actions = [[action for step in row for action in step.actions] for row in rows]
    require(all(actions) and bool(actions), "text", text, "needs at least one step on every line", "one line per rank")
    placement = tuple(tuple(sorted({action.stage for action in row})) for row in actions)
    named = 1 + max(action.microbatch for row in actions for action in row)
    return Plan(name, named if microbatches is None else microbatches, placement, rows)
