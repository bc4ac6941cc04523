"""A design finds the effects that a synthetic study was made with, and says which of them it cannot tell apart."""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from math import prod

import numpy as np
import pytest

from ablations.designs import BASELINE, Design, Effect, Factor, effects, factorial, fractional, one_factor
from ablations.evidence import NoEvidence, sign_flip
from ablations.significance import detectable, detectable_by_flips, holm_adjusted, paired_t
from ablations.study import Study
from bench.record import Record
from dsv3.config import Dropless, Fixed, SwitchLoss, presets, vary

BASE = presets.tiny()
LR = Factor("lr", "train.optimizer.lr", {"usual": 3e-3, "low": 1e-3})
SLOTS = Factor("slots", "model.moe.capacity", {"all": Dropless(), "some": Fixed(factor=1.2)})
LOSS = Factor("loss", "model.moe.balance", {"v3": BASE.model.moe.balance, "switch": (SwitchLoss(),)})  # type: ignore[union-attr]
DECAY = Factor("decay", "train.optimizer.weight_decay", {"some": 0.1, "none": 0.0})
CLIP = Factor("clip", "train.clip_grad_norm", {"one": 1.0, "ten": 10.0})


def measured(design: Design, value: Callable[[dict[str, int], int], float], seeds: int = 6) -> list[Record]:
    """Each arm's figure at each seed, from the codes (-1 or +1) of its factors."""
    known = {"study": "s", "metric": "loss", "unit": "nat/token", "machine": "m", "revision": "r", "profile": "full"}
    rows = []
    for arm, levels in design.levels.items():
        at = {
            factor.name: 1 if level != next(iter(factor.levels)) else -1
            for factor, level in zip(design.factors, levels, strict=True)
        }
        for seed in range(seeds):
            fields = {"arm": arm, "seed": seed, "noise": "absolute", "value": value(at, seed), "n": 1, "time": "t"}
            rows.append(Record(**known, **fields))  # type: ignore[arg-type]
    return rows


def by_name(found: tuple[Effect, ...]) -> dict[str, float]:
    return {effect.name: round(effect.found.value, 9) for effect in found}


def test_one_factor_at_a_time_changes_one_field_per_arm() -> None:
    three = Factor("lr", "train.optimizer.lr", {"usual": 3e-3, "low": 1e-3, "high": 1e-2})
    design = one_factor(BASE, three, SLOTS)
    assert [arm.name for arm in design.arms] == [BASELINE, "lr=low", "lr=high", "slots=some"]
    assert design.arms[0].config == BASE
    assert design.arms[3].config == vary(BASE, **{"model.moe.capacity": Fixed(factor=1.2)})
    with pytest.raises(ValueError, match=r"lr\.levels=3: must be two"):
        effects([], design, "loss", seeds=6)
    with pytest.raises(ValueError, match="arms=3: must be a factorial design"):
        effects([], one_factor(BASE, LR, SLOTS), "loss", seeds=6)


def test_a_factorial_has_every_combination_once() -> None:
    design = factorial(BASE, LR, SLOTS, LOSS)
    assert len({arm.config for arm in design.arms}) == 8
    assert [arm.name for arm in design.arms][:4] == [BASELINE, "loss=switch", "slots=some", "slots=some,loss=switch"]


def test_effects_worked_by_hand() -> None:
    # y: 1 (base), 5 (lr), 2 (slots), 10 (both): lr (5 + 10 - 1 - 2) / 2 = 6, slots 3, together (1 + 10 - 5 - 2) / 2 = 2
    table = {(-1, -1): 1.0, (1, -1): 5.0, (-1, 1): 2.0, (1, 1): 10.0}
    design = factorial(BASE, LR, SLOTS)
    found = effects(measured(design, lambda at, seed: table[at["lr"], at["slots"]], seeds=2), design, "loss", seeds=2)
    assert by_name(found) == {"lr": 6.0, "slots": 3.0, "lr x slots": 2.0}


def test_a_factorial_finds_the_effects_that_made_the_figures_under_the_noise_of_seeds() -> None:
    true = {("lr",): 0.4, ("slots",): -0.2, ("lr", "loss"): 0.3}
    chance, design = np.random.default_rng(0), factorial(BASE, LR, SLOTS, LOSS)

    def value(at: dict[str, int], seed: int) -> float:
        made = sum(size / 2 * prod(at[name] for name in names) for names, size in true.items())
        return 5.0 + seed + made + float(chance.normal(0.0, 0.02))  # seeds differ by far more than any effect

    found = effects(measured(design, value, seeds=8), design, "loss", seeds=8, most=3)
    assert len(found) == 7
    for effect in found:
        expected = true.get(effect.factors, 0.0)
        assert effect.found.low is not None
        assert effect.found.high is not None
        assert abs(effect.found.value - expected) < 0.02
        assert effect.verdict == ("different" if effect.factors in true else "not enough evidence")


def test_only_seeds_that_every_arm_has_speak() -> None:
    design = factorial(BASE, LR)
    rows = measured(design, lambda at, seed: float(at["lr"] * (seed + 1)), seeds=3)
    (found,) = effects([row for row in rows if (row.arm, row.seed) != (BASELINE, 2)], design, "loss", seeds=3)
    assert (found.found.n, found.found.value, found.verdict) == (2, 3.0, "needs the full profile (2 of 3 seeds)")
    with pytest.raises(NoEvidence, match="no record of loss of lr=low"):
        effects([row for row in rows if row.arm == BASELINE], design, "loss", seeds=3)
    apart = [row for row in rows if row.seed == (0 if row.arm == BASELINE else 1)]
    with pytest.raises(NoEvidence, match="no seed has loss of all 2 arms"):
        effects(apart, design, "loss", seeds=3)
    reread = [replace(row, corpus="new") if (row.arm, row.seed) == (BASELINE, 2) else row for row in rows]
    assert effects(reread, design, "loss", seeds=3)[0].found.n == 2, "a seed whose arms read unequal texts does not"


def test_one_seed_gives_effects_without_an_interval_or_a_p() -> None:
    design = factorial(BASE, LR)
    (found,) = effects(measured(design, lambda at, seed: float(at["lr"]), seeds=1), design, "loss", seeds=6)
    assert (found.found.value, found.found.low, found.judged) == (2.0, None, None)
    assert found.verdict == "needs the full profile (1 of 6 seeds)"


def noisy(seeds: int, size: float = 1.0) -> tuple[Design, list[Record]]:
    """Two factors of which one has an effect, under the noise of seeds."""
    chance, design = np.random.default_rng(2), factorial(BASE, LR, SLOTS)
    return design, measured(design, lambda at, seed: size * at["lr"] + float(chance.normal(0.0, 0.1)), seeds)


def test_all_effects_are_one_family_and_the_exact_test_decides_from_the_seeds_on_that_it_needs() -> None:
    for seeds, exact in ((6, False), (7, True)):
        design, rows = noisy(seeds)
        found = {effect.name: effect for effect in effects(rows, design, "loss", seeds=seeds)}
        values = {name: [float(d) for d in by_seed(rows, design, name)] for name in found}
        tests = {name: sign_flip(each) if exact else paired_t(each) for name, each in values.items()}
        sight = detectable_by_flips if exact else detectable
        for name, effect in found.items():
            assert effect.judged is not None
            assert effect.judged.flipped == sign_flip(values[name])
            assert effect.judged.adjusted == holm_adjusted(tests)[name]
            assert effect.judged.detectable == pytest.approx(sight(values[name], 0.05 / 3))
        assert [effect.verdict for effect in found.values()] == ["different", *["not enough evidence"] * 2]


def by_seed(rows: list[Record], design: Design, effect: str) -> list[float]:
    """The contrast of a 2 x 2 written out: base, slots, lr, both."""
    signs = {"lr": (-1, -1, 1, 1), "slots": (-1, 1, -1, 1), "lr x slots": (1, -1, -1, 1)}[effect]
    table = {(row.arm, row.seed): float(row.value or 0) for row in rows}
    seeds = sorted({row.seed or 0 for row in rows})
    return [sum(s * table[arm.name, seed] for s, arm in zip(signs, design.arms, strict=True)) / 2 for seed in seeds]


def test_seeds_beyond_the_declared_change_no_effect() -> None:
    design, rows = noisy(9)
    first = [row for row in rows if (row.seed or 0) < 6]
    assert effects(rows[::-1], design, "loss", seeds=6) == effects(first, design, "loss", seeds=6)


def test_an_effect_names_the_records_that_it_comes_from() -> None:
    design, rows = noisy(2)
    (*_, found) = effects(rows, design, "loss", seeds=2)
    assert set(found.records) == {row.id for row in rows}


def test_what_a_study_combines_are_its_own_arms(coin: Study) -> None:
    design = factorial(BASE, LR, SLOTS)
    with pytest.raises(ValueError, match=r"design=\['base', 'slots=some', .*must have arms of the study"):
        replace(coin, design=design)
    other = vary(design.arms[1].config, **{"train.steps": 7})
    moved = tuple(replace(arm, config=other) if arm.name == "slots=some" else arm for arm in design.arms)
    with pytest.raises(ValueError, match=r"design=\['slots=some'\]"):
        replace(coin, arms=(*coin.arms, *moved), design=design)
    assert replace(coin, arms=(*coin.arms, *design.arms), design=design).design == design


def test_an_arm_says_what_it_has_instead_of_what() -> None:
    words = [arm.changes for arm in factorial(BASE, LR, SLOTS).arms]
    assert words == [
        "usual, all",
        "some instead of all",
        "low instead of usual",
        "low instead of usual and some instead of all",
    ]


def test_a_fraction_holds_the_baseline_and_states_its_aliases() -> None:
    half = fractional(BASE, LR, SLOTS, LOSS, generators={"loss": ("lr", "slots")})
    assert [arm.name for arm in half.arms] == [
        BASELINE,
        "slots=some,loss=switch",
        "lr=low,loss=switch",
        "lr=low,slots=some",
    ]
    found = effects(measured(half, lambda at, seed: 0.0, seeds=2), half, "loss", seeds=2)
    assert {effect.name: effect.aliases for effect in found} == {
        "lr": ("-slots x loss",),
        "slots": ("-lr x loss",),
        "loss": ("-lr x slots",),
    }


FRACTIONS = [
    fractional(BASE, LR, SLOTS, LOSS, generators={"loss": ("lr", "slots")}),
    fractional(BASE, LR, SLOTS, LOSS, DECAY, generators={"decay": ("lr", "slots", "loss")}),
    fractional(BASE, LR, SLOTS, LOSS, DECAY, CLIP, generators={"decay": ("lr", "slots"), "clip": ("lr", "loss")}),
]


@pytest.mark.parametrize("design", FRACTIONS, ids=lambda design: f"{len(design.factors)} factors in {len(design.arms)}")
def test_an_effect_is_itself_and_its_signed_aliases(design: Design) -> None:
    names = [factor.name for factor in design.factors]
    sets = [chosen for size in range(1, len(names) + 1) for chosen in combinations(names, size)]
    true = dict(zip(sets, np.random.default_rng(1).normal(size=len(sets)).tolist(), strict=True))

    def value(at: dict[str, int], seed: int) -> float:
        return 7.0 + sum(size / 2 * prod(at[name] for name in chosen) for chosen, size in true.items())

    told = {" x ".join(chosen): size for chosen, size in true.items()}
    found = effects(measured(design, value, seeds=2), design, "loss", seeds=2, most=len(names))
    assert len(found) == len(design.arms) - 1, "as many as can be told apart"
    for effect in found:
        together = sum(-told[name[1:]] if name.startswith("-") else told[name] for name in effect.aliases)
        assert effect.found.value == pytest.approx(told[effect.name] + together)


@pytest.mark.parametrize(
    "build, error",
    [
        (lambda: one_factor(BASE), r"factors=\(\): must be at least one"),
        (lambda: factorial(BASE, LR, LR), "factors=.*must have distinct names"),
        (lambda: Factor("lr", "train.lr", {"usual": 1}), r"lr\.levels=.*must be two or more"),
        (lambda: factorial(BASE, Factor("lr", "train.lr", {"a": 1, "b": 2})), "has no field 'lr'"),
        (lambda: factorial(BASE, Factor("n", "train.steps", {"a": 1, "b": 2})), "first levels=.*must be what the base"),
        (lambda: factorial(BASE, Factor("n", "train.steps", {"a": 300, "b": -2})), "steps=-2"),
        (lambda: fractional(BASE, LR, SLOTS, generators={"x": ("lr", "slots")}), r"generators\['x'\]"),
        (lambda: fractional(BASE, LR, SLOTS, generators={"slots": ("lr",)}), "must name two or more factors"),
        (
            lambda: fractional(
                BASE, LR, SLOTS, DECAY, CLIP, generators={"decay": ("lr", "slots"), "clip": ("lr", "slots")}
            ),
            "generators=.*must keep any two factors apart",
        ),
    ],
)
def test_a_design_that_cannot_be_is_refused(build: Callable[[], object], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        build()
