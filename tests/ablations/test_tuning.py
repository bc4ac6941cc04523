"""Tuning costs every arm the same, sees no seed and no text of the results, and removes the bias of a best-of-sweep."""

import math
from dataclasses import replace
from statistics import fmean

import numpy as np
import pytest

from ablations.catalogue import load
from ablations.code import ROOT, files_reached
from ablations.tuning import Text, Tuned, Tuning, readings, result, trained, tune
from dsv3.config import Config, digest, presets, vary

LR = "train.optimizer.lr"
RATES = (1e-3, 3e-3, 1e-2)
GRID = (1e-4, 1e-3, 1e-2)
TUNING = Tuning(field=LR, values=GRID, seeds=(100, 101))
CONFIGS = {"base": presets.tiny(), "arm": vary(presets.tiny(), **{"model.mtp": None})}
BEST = {digest(CONFIGS["base"].model): 1e-3, digest(CONFIGS["arm"].model): 1e-2}


class Bench:
    """A trial whose best rate is known for either arm; it keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, float, int, Text]] = []

    def __call__(self, config: Config, seed: int, text: Text) -> float:
        model = digest(config.model)
        self.asked.append((model, config.train.optimizer.lr, seed, text))
        return 2.0 + abs(math.log10(config.train.optimizer.lr / BEST[model])) + 0.01 * (seed % 2)


def test_each_arm_gets_its_own_best_value_for_the_same_trainings() -> None:
    bench = Bench()
    found = tune(TUNING, CONFIGS, result_seeds=range(6), trial=bench)
    assert {arm: tuned.value for arm, tuned in found.items()} == {"base": 1e-3, "arm": 1e-2}
    assert found["arm"].config == vary(CONFIGS["arm"], **{LR: 1e-2})
    assert {tuned.trainings for tuned in found.values()} == {6}
    asked = {arm: [row[1:] for row in bench.asked if row[0] == digest(config.model)] for arm, config in CONFIGS.items()}
    assert asked["base"] == asked["arm"] == [(lr, seed, "validation") for lr in GRID for seed in (100, 101)]
    assert found["base"].flops > found["arm"].flops, "equal trainings are not equal FLOPs: both are said"
    assert found["base"].losses[1e-3] == pytest.approx(2.005)


def test_a_result_is_read_from_the_test_text_at_a_fresh_seed() -> None:
    bench = Bench()
    tuned = tune(TUNING, CONFIGS, result_seeds=range(6), trial=bench)["arm"]
    bench.asked.clear()
    assert result(tuned, 3, bench) == pytest.approx(2.01)
    assert bench.asked == [(digest(tuned.config.model), 1e-2, 3, "test")]
    with pytest.raises(ValueError, match=r"seed=100: must be none of the tuning seeds \(100, 101\)"):
        result(tuned, 100, bench)


def test_a_seed_of_the_results_is_refused_before_anything_is_trained() -> None:
    bench = Bench()
    with pytest.raises(ValueError, match=r"seeds=\[100\]: must be no seeds of the results"):
        tune(TUNING, CONFIGS, result_seeds=range(90, 101), trial=bench)
    with pytest.raises(ValueError, match="has no field 'rate'"):
        tune(Tuning(field="train.rate", values=(1, 2), seeds=(1,)), CONFIGS, result_seeds=(), trial=bench)
    assert bench.asked == []


@pytest.mark.parametrize(
    "change, error",
    [
        ({"values": (1.0,)}, r"values=\(1.0,\): must be two or more"),
        ({"values": (1.0, 1.0)}, "values=.*each once"),
        ({"seeds": ()}, r"seeds=\(\): must be one or more"),
        ({"seeds": (1, 1)}, "seeds=.*each once"),
    ],
)
def test_a_grid_that_is_none_is_refused(change: dict[str, tuple[float, ...]], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Tuning(**{"field": LR, "values": GRID, "seeds": (1,)} | change)  # type: ignore[arg-type]


def test_a_value_that_diverges_loses_and_an_arm_that_always_does_is_named() -> None:
    def trial(config: Config, seed: int, text: Text) -> float:
        return math.nan if config.train.optimizer.lr > 5e-3 and seed == 101 else 3.0

    tuned = tune(TUNING, CONFIGS, result_seeds=range(6), trial=trial)["arm"]
    assert (tuned.value, tuned.losses[1e-2]) == (1e-4, math.inf)
    with pytest.raises(ValueError, match=r"base\.values=.*every value diverged"):
        tune(TUNING, CONFIGS, result_seeds=range(6), trial=lambda config, seed, text: math.inf)


def test_the_whole_grid_and_its_cost_are_readings() -> None:
    def trial(config: Config, seed: int, text: Text) -> float:
        return math.inf if config.train.optimizer.lr > 5e-3 else 3.0

    tuned = tune(TUNING, CONFIGS, result_seeds=range(6), trial=trial)["arm"]
    rows = readings(tuned, "bits_per_byte")
    assert [row.axes for row in rows] == [*({"text": "validation", "lr": lr} for lr in GRID), {"text": "validation"}]
    assert [row.measurement is None for row in rows] == [False, False, True, False]
    assert rows[2].pending == "diverged"
    assert rows[0].config == digest(vary(CONFIGS["arm"], **{LR: 1e-4}))
    assert rows[3].measurement is not None
    assert rows[3].measurement.value == pytest.approx(tuned.flops, abs=1)


def test_the_best_of_a_sweep_flatters_and_the_result_does_not() -> None:
    """All values are equally good and seeds differ by 1: the sweep's best looks better than it is by about 0.85."""
    chance = np.random.default_rng(0)

    def trial(config: Config, seed: int, text: Text) -> float:
        return float(5.0 + chance.normal())

    one = Tuning(field=LR, values=GRID, seeds=(100,))
    found: list[Tuned] = [tune(one, CONFIGS, result_seeds=[0], trial=trial)["arm"] for _ in range(300)]
    fresh = [result(tuned, 0, trial) for tuned in found]
    assert fmean(min(tuned.losses.values()) for tuned in found) < 4.3
    assert abs(fmean(fresh) - 5.0) < 3 / math.sqrt(300)


def test_a_model_is_tuned_and_scored_on_texts_that_differ() -> None:
    rows = {"train.steps": 2, "train.batch_size": 2, "train.sequence_length": 32, "train.eval_sequences": 4}
    narrow = {"model.num_hidden_layers": 2, "model.mtp": None}
    config = vary(presets.tiny(), **rows, **narrow)
    tuning = Tuning(field=LR, values=(1e-5, 1e-2), seeds=(100,))
    tuned = tune(tuning, {"arm": config}, result_seeds=[0], trial=trained)["arm"]
    assert tuned.value == 1e-2, "two steps of 1e-5 teach nothing"
    assert tuned.losses[1e-2] == trained(tuned.config, 100, "validation"), "the same to the bit"
    assert result(tuned, 0, trained) != trained(tuned.config, 0, "validation")


def test_a_study_whose_arms_are_tuned_declares_seeds_apart_and_reads_its_result_from_the_test_text() -> None:
    study = load(str(ROOT / "ablations" / "multi_token_tuned.py"))
    tuned = set(range(1000, 1000 + study.seeds["full"]))
    assert not tuned & {cell.seed for cell in study.cells("full")}
    small = replace(study.cells("quick")[0], axes={"steps": 1, "tokens": 128})
    found = study.measure(small)
    assert [reading.axes.get("lr") for reading in found] == [None, *RATES, None]
    assert [reading.axes.get("text") for reading in found] == ["test", *["validation"] * 4]
    assert all(reading.measurement is not None for reading in found)
    assert found[0].config in {reading.config for reading in found[1:4]}, "the result is of a config of the grid"


def test_tuning_is_part_of_what_a_cell_depends_on() -> None:
    reached = {path.relative_to(ROOT).as_posix() for path in files_reached(frozenset({"ablations.tuning"}))}
    assert {"ablations/tuning.py", "bench/training.py", "dsv3/config/change.py"} <= reached
    assert "ablations/study.py" not in reached
