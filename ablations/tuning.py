"""The same tuning budget for every arm, spent on seeds and text that no result is read from.

A new arm that was tuned, against a baseline that was not, measures the tuning; the best of a sweep, reported from the
runs of the sweep, measures luck. So one grid is declared for all arms, each value is trained on the tuning seeds and
scored on the validation text, and the winner is trained anew on the seeds of the results and scored on the test text.
In the `measure` of a study, whose seeds are 0 to 5, with tuning nested in each of them so that the spread over seeds
holds that of tuning too:

    tuning = Tuning(field="train.optimizer.lr", values=(1e-3, 3e-3, 1e-2), seeds=(1000 + cell.seed,))
    tuned = tune(tuning, {cell.arm: CONFIGS[cell.arm]}, result_seeds=range(6), trial=trained)[cell.arm]
    found = Measurement(metric="bits_per_byte", value=result(tuned, cell.seed, trained))
    return [Reading(arm=cell.arm, measurement=found), *readings(tuned, "bits_per_byte")]

Equal trainings are not equal FLOPs where arms differ in size: what each arm has spent is reported in both.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from ablations.study import Reading
from bench.measurement import Measurement
from dsv3.config import Config, digest, vary
from dsv3.config.rules import require
from dsv3.model.cost import flops_per_token

Text = Literal["validation", "test"]
Trial = Callable[[Config, int, Text], float]  # trains a config at a seed; its loss on that text, lower is better


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A grid of one field (a dotted path) and the seeds that each of its values is trained with."""

    field: str
    values: tuple[Any, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        several = len(set(self.values)) == len(self.values) > 1
        require(several, "values", self.values, "must be two or more, each once", "declare a grid")
        once = len(set(self.seeds)) == len(self.seeds) > 0
        require(once, "seeds", self.seeds, "must be one or more, each once", "declare the seeds of tuning")


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """An arm after tuning: the config with the chosen value, the mean validation loss of every value (infinite where a
    run diverged), and what was spent on finding it.
    """

    arm: str
    tuning: Tuning
    value: Any
    config: Config
    losses: Mapping[Any, float]
    trainings: int
    flops: float


def tune(
    tuning: Tuning, configs: Mapping[str, Config], *, result_seeds: Iterable[int], trial: Trial
) -> dict[str, Tuned]:
    """Every arm's config with the value of the grid that has the lowest mean validation loss; of equal ones the first.

    Raises:
        ValueError: a tuning seed that a result is read from, a field or value that a config refuses (before the first
            training), or an arm of which every value diverged.
    """
    shared = sorted(set(tuning.seeds) & set(result_seeds))
    require(not shared, "seeds", shared, "must be no seeds of the results", "tune on others: 1000 and up")
    grids = {
        arm: {value: vary(config, **{tuning.field: value}) for value in tuning.values}
        for arm, config in configs.items()
    }
    return {arm: _tune(arm, tuning, grid, trial) for arm, grid in grids.items()}


def result(tuned: Tuned, seed: int, trial: Trial) -> float:
    """The loss on the test text of the tuned config, trained at a seed that tuning has not seen.

    Raises:
        ValueError: a seed of the tuning.
    """
    fresh = seed not in tuned.tuning.seeds
    require(fresh, "seed", seed, f"must be none of the tuning seeds {tuned.tuning.seeds}", "use a fresh one")
    return trial(tuned.config, seed, "test")


def readings(tuned: Tuned, metric: str) -> list[Reading]:
    """The whole grid as readings of the arm: validation loss by value, and the FLOPs spent."""
    field = tuned.tuning.field.rpartition(".")[2]
    rows = []
    for value, loss in tuned.losses.items():
        axes = {"text": "validation", field: value if isinstance(value, int | float) else str(value)}
        config = digest(vary(tuned.config, **{tuned.tuning.field: value}))
        if math.isfinite(loss):
            found = Measurement(metric=metric, value=loss)
            rows.append(Reading(arm=tuned.arm, measurement=found, axes=axes, config=config))
        else:
            # One value of a grid may diverge without the arm having failed.
            rows.append(Reading(arm=tuned.arm, metric=metric, pending="diverged", axes=axes, config=config))
    spent = Measurement(metric="flops", value=round(tuned.flops))
    return [*rows, Reading(arm=tuned.arm, measurement=spent, axes={"text": "validation"})]


def trained(config: Config, seed: int, text: Text) -> float:
    """The trial of a language model: bits per byte of the text after all steps, on the CPU with one thread; infinite
    for a run that skipped a step.
    """
    import torch

    from bench.training import sick_steps, train
    from dsv3.data.prepare import prepare
    from dsv3.train import TrainState
    from dsv3.train.evaluate import HeldOut, evaluate

    torch.set_num_threads(1)  # sums have one order whatever the cores
    prepared = prepare(config.data, config.model.vocab_size)
    state = TrainState.create(config, seed=seed, device="cpu")
    if sick_steps(train(state, prepared, seed)):
        return math.inf
    split = prepared.validation if text == "validation" else prepared.test
    heldout = HeldOut.of(prepared, split, length=config.train.sequence_length, count=config.train.eval_sequences)
    found = evaluate(state.model, heldout, step=state.step, batch_size=16, precision=config.train.precision)
    return found.bits_per_byte


def _tune(arm: str, tuning: Tuning, grid: Mapping[Any, Config], trial: Trial) -> Tuned:
    losses = {
        value: _mean(trial(config, seed, "validation") for seed in tuning.seeds) for value, config in grid.items()
    }
    best = min(losses, key=lambda value: losses[value])
    require(math.isfinite(losses[best]), f"{arm}.values", tuning.values, "must train", "every value diverged")
    return Tuned(
        arm=arm,
        tuning=tuning,
        value=best,
        config=grid[best],
        losses=losses,
        trainings=len(grid) * len(tuning.seeds),
        flops=len(tuning.seeds) * sum(map(_flops, grid.values())),
    )


def _mean(losses: Iterable[float]) -> float:
    mean = fmean(losses)
    return mean if math.isfinite(mean) else math.inf


def _flops(config: Config) -> float:
    train = config.train
    tokens = train.steps * train.batch_size * train.sequence_length
    return tokens * flops_per_token(config.model, train.sequence_length, training=True)
