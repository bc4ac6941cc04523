"""A run under way: what it is made of, and how that begins, is saved and is taken up again."""

import shutil
from dataclasses import dataclass

import torch

from dsv3.config import Config
from dsv3.config.rules import require
from dsv3.data.baseline import baselines
from dsv3.data.pack import Batches
from dsv3.data.prepare import Prepared, prepare
from dsv3.parallel import Ranks
from dsv3.resilience import checkpoint
from dsv3.train.display import Display
from dsv3.train.evaluate import HeldOut
from dsv3.train.folder import Folder
from dsv3.train.log import Log
from dsv3.train.state import TrainState

MOST_NAMED = 10  # skipped files on the screen; the log names all


@dataclass(frozen=True, kw_only=True)
class Work:
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


def start(config: Config, seed: int, folder: Folder | None, device: torch.device, progress: bool, ranks: Ranks) -> Work:
    """A run before its first step, from text that the first process prepares and the others find in the cache."""
    train = config.train
    if not ranks.first:
        ranks.wait()
    prepared = prepare(config.data, config.model.vocab_size)
    if ranks.first:
        ranks.wait()
    splits = {"validation": prepared.validation, "test": prepared.test}
    heldout = {
        name: HeldOut.of(prepared, split, length=train.sequence_length, count=train.eval_sequences)
        for name, split in splits.items()
    }
    return Work(
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


def announce(work: Work, seed: int) -> None:
    """Put into the log, the folder and on the screen what the run is about to do."""
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


def save(work: Work) -> None:
    """Write a checkpoint, if the run has a folder."""
    if work.folder is not None and work.ranks.first:
        data = {"corpus": work.prepared.digest, "cursor": work.batches.state_dict()}
        state = work.state.state_dict() | {"data": data}
        checkpoint.save(work.folder.checkpoints, work.state.step, state, keep=work.config.train.keep_checkpoints)


def restore(work: Work) -> None:
    """Take up the newest whole checkpoint; without any, the run was killed before its first and starts anew."""
    assert work.folder is not None, "a run that resumes has a folder"
    step = 0
    if checkpoint.found(work.folder.checkpoints):
        step, saved = checkpoint.load_latest(work.folder.checkpoints)
        corpus, rule = saved["data"]["corpus"], "the checkpoint was trained on another corpus"
        here = work.prepared.digest
        require(corpus == here, "corpus", here, f"{rule}, {corpus}", "resume with that data and Python version")
        work.state.load_state_dict(saved)
        work.batches.load_state_dict(saved["data"]["cursor"])
    if work.ranks.first:
        work.log.resume(step)
