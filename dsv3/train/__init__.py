"""The train room: a model, an optimizer and a stream of batches become a state; a step moves it and says what happened.

    schedule    the learning rate of each step           loss      main, multi-token and balance parts, by name
    optimizer   AdamW with DeepSeek's decay groups       step      accumulate, average, clip, update, rebalance
    state       what a checkpoint holds                  evaluate  bits per byte of held-out text
    folder      what a run writes, and where             work      how a run begins, is saved, is taken up again
    log         a line of JSON per step                  display   the progress line
    options     the command line

`loop` is the whole story: `run(config)`, or `python -m dsv3.train`. What needs torch is imported when it is first asked
for, so that a mistyped option is refused at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv3.train.loop import RunResult, run
    from dsv3.train.state import TrainState
    from dsv3.train.step import StepReport, train_step

__all__ = ["RunResult", "StepReport", "TrainState", "run", "train_step"]

_HOME = {"RunResult": "loop", "StepReport": "step", "TrainState": "state", "run": "loop", "train_step": "step"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
