"""What a budget is asked for, checked before anything slow: the model, a microbatch, a recipe, a policy, a split.

`figures` are the answers by arithmetic, as the metrics of records: the same that a trace measures.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.budget.activations import POLICIES, Batch, Policy, kept_bytes, recomputed_flops
from bench.budget.shares import Share, shares
from bench.budget.splits import Split, check
from bench.budget.states import Recipe
from bench.budget.traffic import sent
from dsv3.config import Blocks, Config, Indexer, presets, vary
from dsv3.config.rules import require
from dsv3.model import cost
from dsv3.model.hf.config import read_config

LENGTH = 4096  # of a sequence, for a model without a training config
REPLICAS = 64  # where the question has none
DEEPSEEK = Split(  # arXiv 2412.19437 section 3.2
    pp=16, ep=64, dp=128, zero=1, microbatches=120, schedule="dual_pipe"
)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question. `config` holds the model and the length; `sequences` rows make a microbatch."""

    name: str
    config: Config
    recipe: Recipe
    policy: Policy = "none"
    split: Split = field(default_factory=Split)
    sequences: int = 1

    def __post_init__(self) -> None:
        require(self.policy in POLICIES, "recompute", self.policy, f"must be one of {', '.join(POLICIES)}", "pick one")
        require(self.sequences >= 1, "sequences", self.sequences, "must be at least 1", "a microbatch has rows")
        select = self.config.model.attention.select
        if isinstance(select, Indexer):
            rule = "must be 'sparse': an indexer that warms up beside frozen weights is not priced"
            require(select.stage == "sparse", "attention.select.stage", select.stage, rule, "ask for the later stage")
        if isinstance(select, Blocks):
            rule = "must be 'nothing': what a choice that learns keeps for backward is not priced"
            require(
                select.learns == "nothing", "attention.select.learns", select.learns, rule, "ask for one that does not"
            )
        check(self.config.model, self.split)

    @property
    def batch(self) -> Batch:
        """The microbatch."""
        length = self.config.train.sequence_length
        return Batch(sequences=self.sequences, length=length, element=self.recipe.weight)


def preset(name: str, length: int | None) -> tuple[str, Config]:
    """A preset's name and config, at another length if one is given.

    Raises:
        ValueError: for a name that is no preset, or a length that its model does not allow.
    """
    config = presets.named(name)
    return name, config if length is None else vary(config, **{"train.sequence_length": length})


def checkpoint(folder: Path, length: int | None) -> tuple[str, Config]:
    """The name of a checkpoint's folder and the config of its model.

    Raises:
        ValueError: for a folder without config.json, or a model that is not of this family.
    """
    path = folder / "config.json"
    require(path.is_file(), "--hf-config", str(folder), "must be a folder with a config.json", "check the path")
    model = read_config(path.read_text())
    fitting = min(LENGTH, model.max_position_embeddings)
    plain = presets.deepseek_v3()
    changes = {"model": model, "train.sequence_length": fitting if length is None else length}
    return folder.resolve().name, vary(plain, **changes)


def figures(asked: Asked) -> dict[str, int]:
    """Size, work and memory of one microbatch on one device, by metric."""
    model, recipe = asked.config.model, asked.recipe
    parameters = cost.parameters(model)
    length = asked.batch.length
    flops = asked.sequences * length * cost.flops_per_token(model, length, training=True)
    return {
        "parameters": parameters,
        "parameter_bytes": recipe.weight * parameters,
        "gradient_bytes": recipe.gradient * parameters,
        "optimizer_bytes": recipe.optimizer * parameters,
        "saved_bytes": kept_bytes(model, asked.batch, asked.policy),
        "flops": round(flops) + recomputed_flops(model, asked.batch, asked.policy),
        "live_bytes": alone(asked).total,
    }


def alone(asked: Asked) -> Share:
    """One device that holds the whole model, in a microbatch after the first."""
    (share,) = shares(asked.config.model, Split(microbatches=2), asked.recipe, asked.batch, asked.policy)
    return share


def replica_figures(asked: Asked) -> dict[str, int]:
    """Bytes that one of several replicas of the whole model sends in a step of `dsv3.parallel`, and its peak: in
    backward, or in the exchange, when states and two flat buffers of all gradients are there.
    """
    split, share = replicas(asked), alone(asked)
    states = share.parameters + share.gradients + share.optimizer
    return {
        "sent_bytes": sent(asked.config.model, split, asked.recipe, asked.batch, 0)["data"],
        "live_bytes": max(share.total, states + 2 * share.gradients),
    }


def replicas(asked: Asked) -> Split:
    """The data parallelism of the question, or a usual one, alone: what `dsv3.parallel` does."""
    return Split(dp=asked.split.dp if asked.split.dp > 1 else REPLICAS)


def examples(asked: Asked) -> tuple[Split, ...]:
    """The split that was asked for, and well-known ones that come out even for this model."""
    known = (
        Split(),
        Split(dp=REPLICAS, zero=1),
        Split(dp=REPLICAS, zero=3),
        Split(tp=8, pp=8, ep=8, dp=8, zero=1, microbatches=16, sequence_parallel=True),
        vary(DEEPSEEK, schedule="one_f_one_b"),
        DEEPSEEK,
    )
    return tuple(dict.fromkeys((asked.split, *_even(asked, known))))


def _even(asked: Asked, splits: tuple[Split, ...]) -> Iterator[Split]:
    for split in splits:
        try:
            check(asked.config.model, split)
        except ValueError:
            continue
        yield split
