"""Arms built from factors, and what each factor and each pair of them does.

    one factor at a time   the baseline and one arm per further level: cheap, blind to interactions
    factorial              every combination of levels: 2^k arms tell k factors and all their interactions apart
    fractional factorial   2^(k-p) of them: the level of p factors follows from that of others, and so some effects
                           become aliases, of which only the sum or difference is estimated

A factor is a field of the config and its levels; the first is the baseline's. With two levels coded -1 and +1, the
effect of a set of factors is a contrast of the 2^k arms (Box, Hunter and Hunter 2005, chapters 5 and 6):

    effect(S) = mean of y where the product of the codes of S is +1 - mean of y where it is -1

so an interaction of two factors is half the difference that one makes to the effect of the other. Each seed that all
arms have gives one value of each effect: pairs by design, with a t interval over seeds; all effects are one family of
tests (`ablations.significance`) over the declared seeds.

A study that sets `design=factorial(...)` has a table of its effects in the report; ablations/moe_factorial.py is one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations, product
from math import prod
from typing import Any

from ablations.evidence import Estimate, NoEvidence, mean, replicates
from ablations.significance import ALPHA, Judged, judge_family
from ablations.study import Arm
from bench.record import Record
from dsv3.config import Config, vary
from dsv3.config.rules import require

BASELINE = "base"
Value = str | int | float


@dataclass(frozen=True)
class Factor:
    """A field of the config, as a dotted path, and its levels by name; the first level is what the baseline has."""

    name: str
    field: str
    levels: Mapping[str, Any]

    def __post_init__(self) -> None:
        names = list(self.levels)
        require(len(names) > 1, f"{self.name}.levels", names, "must be two or more", "add what it is compared with")


@dataclass(frozen=True, kw_only=True)
class Design:
    """Arms and the level that each has of each factor; `words` are the defining words, sets of factors whose codes have
    the same product in every arm (none in a full design). The baseline being an arm, it is -1 for an odd number.
    """

    factors: tuple[Factor, ...]
    arms: tuple[Arm, ...]
    levels: Mapping[str, tuple[str, ...]]
    words: tuple[frozenset[str], ...] = ()

    @property
    def crossed(self) -> bool:
        """Whether effects can be told from it: two levels of each factor, in all combinations or a fraction of them."""
        two = all(len(factor.levels) == 2 for factor in self.factors)
        return two and len(self.arms) * (len(self.words) + 1) == 2 ** len(self.factors)

    def aliases(self, effect: frozenset[str]) -> tuple[frozenset[str], ...]:
        """The effects that no arm of this design tells apart from `effect`, the shortest first."""
        return tuple(sorted((effect ^ word for word in self.words), key=_length))

    def told_apart(self, most: int = 2) -> dict[tuple[str, ...], tuple[str, ...]]:
        """The effects of up to `most` factors that can be estimated, each with its aliases by name: of effects that are
        aliases the one with the fewest factors stands.
        """
        names = [factor.name for factor in self.factors]
        shown: dict[tuple[str, ...], tuple[str, ...]] = {}
        hidden = set(self.words)
        for chosen in (chosen for size in range(1, most + 1) for chosen in combinations(names, size)):
            effect = frozenset(chosen)
            if effect not in hidden:
                hidden |= {effect, *self.aliases(effect)}
                shown[chosen] = tuple(_signed(effect, alias, names) for alias in self.aliases(effect))
        return shown


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What a factor, or factors together, do to a metric, plus what its aliases do (minus, where a name begins with
    "-").

    seeds     how many are declared
    judged    what the tests say, all effects being one family; None before every arm has its last declared seed
    records   ids of what it was computed from
    """

    factors: tuple[str, ...]
    found: Estimate
    seeds: int
    judged: Judged | None = None
    aliases: tuple[str, ...] = ()
    records: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The factors joined: "lr x depth"."""
        return told(self.factors)

    @property
    def verdict(self) -> str:
        """What the test that decides says, at a family-wise error of 5%."""
        if self.judged is None:
            return f"needs the full profile ({self.found.n} of {self.seeds} seeds)"
        return "different" if self.judged.adjusted <= ALPHA else "not enough evidence"


def one_factor(base: Config, *factors: Factor) -> Design:
    """The baseline, and for each further level of each factor an arm that changes nothing else.

    Raises:
        ValueError: a field that the config lacks, a level that it refuses, or a first level that is not the base's.
    """
    first = tuple(next(iter(factor.levels)) for factor in factors)
    rows = [first]
    for at, factor in enumerate(factors):
        rows += [(*first[:at], level, *first[at + 1 :]) for level in list(factor.levels)[1:]]
    return _design(base, factors, rows)


def factorial(base: Config, *factors: Factor) -> Design:
    """An arm for every combination of levels, the last factor moving fastest.

    Raises:
        ValueError: as `one_factor`.
    """
    return _design(base, factors, list(product(*(factor.levels for factor in factors))))


def fractional(base: Config, *factors: Factor, generators: Mapping[str, Sequence[str]]) -> Design:
    """2^(k-p) arms: with `generators={"d": ("a", "b", "c")}` the code of d is the product of those of a, b and c (of an
    even number its opposite, which keeps the baseline an arm).

    Raises:
        ValueError: as `one_factor`; a factor without exactly two levels; a generator of an unknown factor, or by one
            that is generated itself; generators that leave two factors as one.
    """
    _require_two_levels(factors)
    free = [factor for factor in factors if factor.name not in generators]
    known = {factor.name for factor in factors}
    for name, parts in generators.items():
        fits = name in known and len(parts) > 1 and set(parts) <= {factor.name for factor in free}
        require(fits, f"generators[{name!r}]", parts, "must name two or more factors that are free", "see the example")
    rows = []
    for codes in product((-1, 1), repeat=len(free)):
        code = dict(zip((factor.name for factor in free), codes, strict=True))
        for name, parts in generators.items():
            code[name] = prod(code[part] for part in parts) * (-1) ** (len(parts) + 1)
        rows.append(tuple(list(factor.levels)[code[factor.name] > 0] for factor in factors))
    words = _group([frozenset((name, *parts)) for name, parts in generators.items()])
    require(len(words[0]) > 2, "generators", dict(generators), "must keep any two factors apart", "use other products")
    return _design(base, factors, rows, words)


def effects(
    records: Sequence[Record], design: Design, metric: str, *, seeds: int, most: int = 2, **where: Value
) -> tuple[Effect, ...]:
    """Main effects and the interactions of up to `most` factors, over the seeds that every arm has, of `seeds` declared
    ones.

    Raises:
        ValueError: factors without exactly two levels, or a design of one factor at a time.
        NoEvidence: an arm has no record, or no seed is in all of them.
    """
    _require_two_levels(design.factors)
    require(
        design.crossed, "arms", len(design.arms), "must be a factorial design or a fraction of one", "use factorial"
    )
    rows = _rows(records, design, metric, where)[:seeds]
    shown = design.told_apart(most)
    found = {told(chosen): _contrast(design, frozenset(chosen), rows) for chosen in shown}
    whole = found if len(rows) == seeds > 1 else {}
    judged = judge_family(whole, comparisons=len(found), seeds=seeds)
    return tuple(
        Effect(
            factors=chosen,
            found=mean(found[told(chosen)]),
            seeds=seeds,
            judged=judged.get(told(chosen)),
            aliases=aliases,
            records=tuple(record.id for row in rows for record in row.values()),
        )
        for chosen, aliases in shown.items()
    )


def told(factors: Sequence[str]) -> str:
    """Factors together, as one name."""
    return " x ".join(factors)


def _design(
    base: Config, factors: Sequence[Factor], rows: Sequence[tuple[str, ...]], words: Sequence[frozenset[str]] = ()
) -> Design:
    require(len(factors) > 0, "factors", factors, "must be at least one", "say what is changed")
    names = [factor.name for factor in factors]
    require(len(set(names)) == len(names), "factors", names, "must have distinct names", "rename one of each pair")
    first = {factor.field: next(iter(factor.levels.values())) for factor in factors}
    same = vary(base, **first) == base
    require(same, "first levels", first, "must be what the baseline has", "put the baseline's level first")
    arms, levels = [], {}
    for row in rows:
        chosen = {f.field: f.levels[level] for f, level in zip(factors, row, strict=True)}
        moved = [(f, level) for f, level in zip(factors, row, strict=True) if level != next(iter(f.levels))]
        name = ",".join(f"{f.name}={level}" for f, level in moved) or BASELINE
        changed = " and ".join(f"{level} instead of {next(iter(f.levels))}" for f, level in moved) or ", ".join(row)
        arms.append(Arm(name, changed, vary(base, **chosen)))
        levels[name] = row
    return Design(factors=tuple(factors), arms=tuple(arms), levels=levels, words=tuple(words))


def _group(generating: Sequence[frozenset[str]]) -> tuple[frozenset[str], ...]:
    """All defining words: the products of the generating ones, in which a factor that stands twice cancels."""
    words = {
        reduce(lambda word, other: word ^ other, chosen, frozenset[str]())
        for size in range(1, len(generating) + 1)
        for chosen in combinations(generating, size)
    }
    return tuple(sorted(words, key=_length))


def _rows(
    records: Sequence[Record], design: Design, metric: str, where: Mapping[str, Value]
) -> list[dict[str, Record]]:
    """For each seed that every arm has, in order, the arms' records."""
    found = {arm.name: replicates(records, arm=arm.name, metric=metric, **where) for arm in design.arms}
    seeds = [seed for seed in found[design.arms[0].name] if all(seed in rows for rows in found.values())]
    seeds = [seed for seed in seeds if len({rows[seed].corpus for rows in found.values()}) == 1]
    if not seeds:
        raise NoEvidence(f"no seed has {metric} of all {len(design.arms)} arms")
    return [{arm: rows[seed] for arm, rows in found.items()} for seed in sorted(seeds, key=lambda seed: seed or 0)]


def _contrast(design: Design, effect: frozenset[str], rows: Sequence[Mapping[str, Record]]) -> list[float]:
    """By seed: the mean of the arms whose codes of the effect multiply to +1, minus that of the others."""
    signs = {
        arm: prod(
            1 if level != next(iter(factor.levels)) else -1
            for factor, level in zip(design.factors, levels, strict=True)
            if factor.name in effect
        )
        for arm, levels in design.levels.items()
    }
    return [
        2 * sum(signs[arm] * float(record.value or 0.0) for arm, record in row.items()) / len(signs) for row in rows
    ]


def _require_two_levels(factors: Sequence[Factor]) -> None:
    for factor in factors:
        count = len(factor.levels)
        require(count == 2, f"{factor.name}.levels", count, "must be two for contrasts", "split it, or use one_factor")


def _signed(effect: frozenset[str], alias: frozenset[str], names: Sequence[str]) -> str:
    minus = "-" if len(effect ^ alias) % 2 else ""
    return minus + told([name for name in names if name in alias])


def _length(effect: frozenset[str]) -> tuple[int, list[str]]:
    return len(effect), sorted(effect)
