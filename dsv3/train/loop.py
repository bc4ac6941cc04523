"""A whole run: text to tokens, tokens to batches, batches to steps, with evaluations, a log and checkpoints on the way.

A run that was killed goes on from its last checkpoint as if nothing had happened: on a CPU bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dsv3.config import Config
from dsv3.config.rules import require
from dsv3.data.read import Skipped
from dsv3.model import Transformer
from dsv3.parallel import ALONE, Ranks
from dsv3.train.evaluate import Evaluation, evaluate
from dsv3.train.folder import Folder, open_folder
from dsv3.train.step import StepReport, train_step
from dsv3.train.work import Work, announce, restore, save, start

MOST_SKIPPED = 10  # updates in a row that a run survives


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run gave; baselines are bits per byte of its validation text.

    Reports of a resumed run begin at its first step.
    """

    config: Config
    seed: int
    corpus: str
    skipped: tuple[Skipped, ...]
    reports: tuple[StepReport, ...]
    validation: tuple[Evaluation, ...]
    test: Evaluation
    baselines: dict[str, float]
    model: Transformer


def run(
    config: Config,
    *,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
    progress: bool = True,
    on_step: Callable[[StepReport], None] | None = None,
    ranks: Ranks = ALONE,
) -> RunResult:
    """Train a model of `config` and evaluate it; with `out`, write a log and checkpoints there.

    Raises:
        ValueError: before any work, for data that cannot be used, a folder that cannot be written or holds another run,
            a checkpoint of other data.
        FloatingPointError: when the gradient stays infinite or NaN.
    """
    require(out is not None or not resume, "resume", resume, "needs the folder of the run", "pass out")
    folder = None if out is None else Folder(Path(out))
    if folder is not None and ranks.first:
        open_folder(folder, config, resume=resume, overwrite=overwrite)
    work = start(config, seed, folder, torch.device(device), progress, ranks)
    if resume:
        restore(work)
    announce(work, seed)
    train = config.train
    with work.display:
        while work.state.step < train.steps:
            report = _step(work)
            if on_step is not None:
                on_step(report)
            if _due(train.eval_every, work):
                _evaluate(work, "validation")
            if _due(train.checkpoint_every, work):
                save(work)
        test = _evaluate(work, "test")
    return RunResult(
        config=config,
        seed=seed,
        corpus=work.prepared.digest,
        skipped=work.prepared.skipped,
        reports=work.log.reports(),
        validation=work.log.validations(),
        test=test,
        baselines=work.baselines,
        model=work.state.model,
    )


def _step(work: Work) -> StepReport:
    rows = work.batches.next()
    text_bytes = int(work.prepared.bytes_per_token[rows[:, 1:]].sum())
    report = train_step(work.state, rows.to(work.state.device), ranks=work.ranks, text_bytes=text_bytes)
    work.log.record("step", report)
    work.display.step(report)
    if work.log.skipped_in_a_row() >= MOST_SKIPPED:
        raise FloatingPointError(
            f"step {report.step}: {MOST_SKIPPED} updates in a row were {report.health}; lower the learning rate "
            "or clip_grad_norm, or resume from an earlier checkpoint"
        )
    return report


def _evaluate(work: Work, split: str) -> Evaluation:
    train = work.config.train
    evaluation = evaluate(
        work.state.model,
        work.heldout[split],
        step=work.state.step,
        batch_size=train.batch_size,
        precision=train.precision,
        ranks=work.ranks,
    )
    work.log.record(split, evaluation)
    work.display.evaluation(split, evaluation, work.baselines if split == "validation" else {})
    return evaluation


def _due(every: int, work: Work) -> bool:
    return work.state.step % every == 0 or work.state.step == work.config.train.steps
