"""A short training, and a training step to be timed, as studies of a model need them."""

from collections.abc import Callable

import torch

from dsv3.config import Config
from dsv3.data.pack import Batches
from dsv3.data.prepare import Prepared
from dsv3.train import TrainState, train_step
from dsv3.train.step import StepReport


def train(state: TrainState, prepared: Prepared, seed: int) -> list[StepReport]:
    """All steps of the state's config, in place, on the training split in the order of `seed`; what each reported."""
    config = state.config.train
    batches = Batches(prepared.train, config.batch_size, config.sequence_length, seed)
    return [train_step(state, batches.next().to(state.device)) for _ in range(config.steps)]


def sick_steps(reports: list[StepReport]) -> str:
    """Why the first update that was not made was not, or nothing: in fp32 only a run that diverges skips one."""
    return next((f"step {report.step}: {report.health}" for report in reports if report.health != "ok"), "")


def step_on_random_tokens(config: Config, seed: int, device: str) -> Callable[[], float]:
    """A whole training step of a fresh model, again and again on the same random tokens; returns its main loss."""
    state = TrainState.create(config, seed=seed, device=device)
    generator = torch.Generator().manual_seed(seed)
    shape = (config.train.batch_size, config.train.sequence_length + 1)
    rows = torch.randint(0, config.model.vocab_size, shape, generator=generator).to(state.device)
    return lambda: train_step(state, rows).losses["main"]
