"""A whole run: text to tokens, tokens to batches, batches to steps, with evaluations, a log and checkpoints on the way.

A run that was killed goes on from its last checkpoint as if nothing had happened: on a CPU bit for bit.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dsv3.config import Config
from dsv3.config.rules import require
from dsv3.data.baseline import baselines
from dsv3.data.pack import Batches
from dsv3.data.prepare import Prepared, prepare
from dsv3.data.read import Skipped
from dsv3.model import Transformer
from dsv3.parallel import ALONE, Ranks
from dsv3.resilience import found, load_latest, save
from dsv3.train.display import Display
from dsv3.train.evaluate import Evaluation, HeldOut, evaluate
from dsv3.train.folder import Folder, open_folder
from dsv3.train.log import Log
from dsv3.train.state import TrainState
from dsv3.train.step import StepReport, train_step

MOST_SKIPPED = 10  # updates in a row that a run survives
MOST_NAMED = 10  # skipped files on the screen; the log names all


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


@dataclass(frozen=True, kw_only=True)
class _Work:
    """A run under way."""

    config: Config
    folder: Folder | None
    prepared: Prepared
    heldout: dict[str, HeldOut]
    baselines: dict[str, float]
    state: TrainState
    batches: Batches
    log: Log
    display: Display
    ranks: Ranks


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
    work = _start(config, seed, folder, torch.device(device), progress, ranks)
    if resume:
        _restore(work)
    _announce(work, seed)
    train = config.train
    with work.display:
        while work.state.step < train.steps:
            report = _step(work)
            if on_step is not None:
                on_step(report)
            if _due(train.eval_every, work):
                _evaluate(work, "validation")
            if _due(train.checkpoint_every, work):
                _save(work)
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


def _start(
    config: Config, seed: int, folder: Folder | None, device: torch.device, progress: bool, ranks: Ranks
) -> _Work:
    train = config.train
    if not ranks.first:
        ranks.wait()
    prepared = prepare(config.data, config.model.vocab_size)
    if ranks.first:
        ranks.wait()  # the others find in the cache what the first one built
    splits = {"validation": prepared.validation, "test": prepared.test}
    heldout = {
        name: HeldOut.of(prepared, split, length=train.sequence_length, count=train.eval_sequences)
        for name, split in splits.items()
    }
    return _Work(
        config=config,
        folder=folder,
        prepared=prepared,
        heldout=heldout,
        baselines=baselines(prepared, heldout["validation"].rows.numpy()),
        state=TrainState.create(config, seed=seed, device=device),
        batches=Batches(prepared.train, train.batch_size, train.sequence_length, seed),
        log=Log(folder.log if folder is not None and ranks.first else None),
        display=Display(train.steps, shown=progress and ranks.first),
        ranks=ranks,
    )


def _announce(work: _Work, seed: int) -> None:
    prepared = work.prepared
    if work.folder is not None and work.ranks.first:
        shutil.copy(prepared.folder / "tokenizer.json", work.folder.tokenizer)
    skipped = [f"{skip.path}: {skip.reason}" for skip in prepared.skipped]
    work.log.write("run", seed=seed, corpus=prepared.digest, skipped=skipped, baselines=work.baselines)
    tokens = f"{len(prepared.train.tokens):,} training tokens"
    work.display.say(f"corpus {prepared.digest}: {tokens} of {', '.join(prepared.domains)}; seed {seed}")
    if skipped:
        work.display.say("\n  ".join([f"skipped {len(skipped)}:", *skipped[:MOST_NAMED]]))
    if work.state.step:
        work.display.say(f"going on after step {work.state.step}")


def _step(work: _Work) -> StepReport:
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


def _evaluate(work: _Work, split: str) -> Evaluation:
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


def _due(every: int, work: _Work) -> bool:
    return work.state.step % every == 0 or work.state.step == work.config.train.steps


def _save(work: _Work) -> None:
    if work.folder is not None and work.ranks.first:
        data = {"corpus": work.prepared.digest, "cursor": work.batches.state_dict()}
        state = work.state.state_dict() | {"data": data}
        save(work.folder.checkpoints, work.state.step, state, keep=work.config.train.keep_checkpoints)


def _restore(work: _Work) -> None:
    """Take up the newest whole checkpoint; without any, the run was killed before its first and starts anew."""
    assert work.folder is not None, "a run that resumes has a folder"
    step = 0
    if found(work.folder.checkpoints):
        step, saved = load_latest(work.folder.checkpoints)
        corpus, rule = saved["data"]["corpus"], "the checkpoint was trained on another corpus"
        here = work.prepared.digest
        require(corpus == here, "corpus", here, f"{rule}, {corpus}", "resume with that data and Python version")
        work.state.load_state_dict(saved)
        work.batches.load_state_dict(saved["data"]["cursor"])
    if work.ranks.first:
        work.log.resume(step)
