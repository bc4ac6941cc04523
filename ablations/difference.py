"""What an arm changes against its baseline, from the two configs, and what is then no longer equal.

A study says in words what an arm is; its config says it exactly. Walking both configs side by side gives the factors,
each as a dotted path with its old and new value (`model.moe.capacity: Dropless() -> Fixed(factor=1.2)`). An arm that
differs in one factor may still differ in size, work or memory, and then an effect has more than one possible cause:
size, work and bytes by `dsv3.model.cost` are set side by side, and one that is off by more than 1% is not matched.
What an expert with a capacity drops it does not compute; routing decides how much that is, so it stands in words.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from math import inf
from typing import Any, assert_never

from ablations.study import Study
from bench.budget.states import recipe
from dsv3.config import SGD, AdamW, Config, Dropless, Optimizer
from dsv3.model.cost import active_parameters, flops_per_token, kv_bytes_per_token, parameters

KEPT = recipe("float32")  # what dsv3.train keeps of every parameter, whatever the precision of its products
DROPS = "work of the experts: less by what each run drops, which FLOPs count as computed"
TOLERANCE = 0.01  # beyond it a quantity is not matched: head widths are whole numbers, which meet no target exactly


@dataclass(frozen=True, kw_only=True)
class Change:
    """One field that differs: its dotted path, its value in the baseline and in the arm, as text."""

    field: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.field}: {self.old} -> {self.new}"


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A cost by arithmetic, in the baseline and in the arm; `unit` as in bench/metrics.py."""

    name: str
    unit: str
    old: float
    new: float

    @property
    def ratio(self) -> float:
        """The arm's over the baseline's; of two nothings 1."""
        if self.old == 0:
            return 1.0 if self.new == 0 else inf
        return self.new / self.old

    @property
    def matched(self) -> bool:
        """Whether the two agree within 1%."""
        return abs(self.ratio - 1) <= TOLERANCE


@dataclass(frozen=True, kw_only=True)
class Difference:
    """An arm against its baseline; `changes` and `quantities` are empty where no config defines both. `unsettled`: in
    words, what is unequal by as much as each run decides.
    """

    arm: str
    words: str
    configured: bool
    changes: tuple[Change, ...] = ()
    quantities: tuple[Quantity, ...] = ()
    unsettled: tuple[str, ...] = ()

    @property
    def unmatched(self) -> tuple[Quantity, ...]:
        """The quantities that are off by more than 1%."""
        return tuple(quantity for quantity in self.quantities if not quantity.matched)


def differences(study: Study) -> tuple[Difference, ...]:
    """Every arm of the study but its baseline, against the baseline."""
    base = study.config(study.baseline)
    return tuple(
        _difference(arm.name, arm.changes, base, study.config(arm.name))
        for arm in study.arms
        if arm.name != study.baseline
    )


def changes(old: Any, new: Any, path: str = "") -> Iterator[Change]:
    """The fields in which two configs differ, in the order of their declaration.

    A union's variant that is exchanged for another is one factor, whatever fields either has.
    """
    if old == new:
        return
    if type(old) is type(new) and is_dataclass(old):
        for field in fields(old):
            below = f"{path}.{field.name}" if path else field.name
            yield from changes(getattr(old, field.name), getattr(new, field.name), below)
    else:
        yield Change(field=path, old=told(old), new=told(new))


def quantities(old: Config, new: Config) -> tuple[Quantity, ...]:
    """Size, work and memory of two runs. FLOPs are of training, per token and over the run; the cache is in bf16,
    weights and what the optimizer keeps are as dsv3.train has them.
    """
    before, after = _quantities(old), _quantities(new)
    return tuple(
        Quantity(name=name, unit=unit, old=value, new=after[name, unit]) for (name, unit), value in before.items()
    )


def told(value: Any) -> str:
    """A value as one would write it: a config with the fields that are not at their default."""
    if isinstance(value, tuple):
        return f"({', '.join(map(told, value))})"
    if not is_dataclass(value) or isinstance(value, type):
        return str(value)
    given = [
        f"{field.name}={told(getattr(value, field.name))}"
        for field in fields(value)
        if getattr(value, field.name) != _default(field)
    ]
    return f"{type(value).__name__}({', '.join(given)})"


def _difference(arm: str, words: str, base: Config | None, config: Config | None) -> Difference:
    if base is None or config is None:
        return Difference(arm=arm, words=words, configured=False)
    return Difference(
        arm=arm,
        words=words,
        configured=True,
        changes=tuple(changes(base, config)),
        quantities=quantities(base, config),
        unsettled=(DROPS,) if base != config and (_drops(base) or _drops(config)) else (),
    )


def _drops(config: Config) -> bool:
    return config.model.moe is not None and not isinstance(config.model.moe.capacity, Dropless)


def _quantities(config: Config) -> dict[tuple[str, str], float]:
    model, train = config.model, config.train
    flops = flops_per_token(model, train.sequence_length, training=True)
    tokens = train.steps * train.batch_size * train.sequence_length
    return {
        ("parameters", "parameters"): parameters(model),
        ("active parameters", "parameters"): active_parameters(model),
        ("FLOPs per token", "FLOP"): flops,
        ("weight bytes", "B"): KEPT.weight * parameters(model),
        ("optimizer bytes", "B"): _optimizer_bytes(train.optimizer) * parameters(model),
        ("cache bytes per token", "B"): kv_bytes_per_token(model),
        ("tokens", "tokens"): tokens,
        ("FLOPs", "FLOP"): tokens * flops,
    }


def _optimizer_bytes(optimizer: Optimizer) -> int:
    """What the optimizer keeps of each parameter."""
    match optimizer:
        case AdamW():
            return KEPT.optimizer
        case SGD():
            return 0
        case _:
            assert_never(optimizer)


def _default(field: Any) -> Any:
    """The field's default; a mark that equals no value where it has none."""
    return field.default_factory() if callable(field.default_factory) else field.default
