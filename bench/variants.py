"""What the gate measures: a small training step of each design choice, and the pipeline plans.

Every variant is the base with one choice changed, so that a difference points at the choice. All figures are exact: a
seeded model, seeded tokens, one thread.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.meters.flops import flops
from bench.meters.memory import peak_bytes
from bench.meters.paired import threads
from bench.meters.saved import saved_bytes
from dsv3.config import (
    MTP,
    BFloat16,
    Config,
    Everything,
    Fixed,
    Float8Block,
    Float16,
    Grouped,
    Latent,
    MoE,
    MultiHead,
    PerHead,
    QuadraticLoss,
    Select,
    SwitchLoss,
    Window,
    presets,
    vary,
)
from dsv3.pipeline import SCHEDULES, Times, bubble, simulate
from dsv3.precision import autocast
from dsv3.train.state import TrainState
from dsv3.train.step import train_step

Figures = dict[str, Any]

BATCH, LENGTH, VOCABULARY = 2, 32, 256
RANKS, MICROBATCHES = 4, 8


def base() -> Config:
    """Latent attention, a dense layer and one of 8 experts, dropless, bias balancing; 64 tokens a step."""
    return vary(
        presets.tiny(),
        **{
            "model.vocab_size": VOCABULARY,
            "model.hidden_size": 64,
            "model.num_hidden_layers": 2,
            "model.intermediate_size": 128,
            "model.attention": Latent(
                num_attention_heads=4,
                q_lora_rank=32,
                kv_lora_rank=32,
                qk_nope_head_dim=16,
                qk_rope_head_dim=8,
                v_head_dim=16,
            ),
            "model.moe": MoE(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32),
            "model.mtp": None,
            "train.batch_size": BATCH,
            "train.sequence_length": LENGTH,
        },
    )


def variants() -> dict[str, Config]:
    """The base and its variants by name."""
    changes: dict[str, dict[str, Any]] = {
        "base": {},
        "multi_head": {"model.attention": multi_head(Everything())},
        "grouped": {"model.attention": Grouped(num_attention_heads=4, num_key_value_heads=2, head_dim=16)},
        "window": {"model.attention": multi_head(Window(size=8))},
        "per_head": {"model.attention": multi_head(PerHead(keep=0.3))},
        "dense": {"model.moe": None},
        "softmax_router": {"model.moe.scoring_func": "softmax"},
        "quadratic_loss": {"model.moe.balance": (QuadraticLoss(),)},
        "switch_loss": {"model.moe.balance": (SwitchLoss(),)},
        "capacity_by_probability": {"model.moe.capacity": Fixed(factor=1.2)},
        "capacity_by_position": {"model.moe.capacity": Fixed(factor=1.2, policy="position")},
        "multi_token_prediction": {"model.mtp": MTP()},
        "accumulation": {"train.accumulation_steps": 2},
        "bfloat16": {"train.precision": BFloat16()},
        "float16": {"train.precision": Float16()},
        "float8_block": {"train.precision": Float8Block()},
    }
    return {name: vary(base(), **change) for name, change in changes.items()}


def multi_head(select: Select) -> MultiHead:
    """Plain attention of the base's width under a selector."""
    return MultiHead(num_attention_heads=4, head_dim=16, select=select)


def tokens() -> Tensor:
    """The batch of every step."""
    return torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def measure_step(config: Config) -> Figures:
    """The exact figures of the second training step of this config."""

    def build() -> tuple[TrainState, Tensor]:
        return TrainState.create(config, seed=0), tokens()

    def step(built: tuple[TrainState, Tensor]) -> None:
        train_step(*built)

    with threads(1):
        peak = peak_bytes(build, step)
        state, rows = build()
        step((state, rows))
        work = flops(lambda: step((state, rows)))
        with autocast(config.train.precision, "cpu"):
            saved = saved_bytes(lambda: state.model(rows[:, :-1]), state.model.parameters())
        with Operators() as operators:
            step((state, rows))
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    exact = {figure.metric: figure.value for figure in (*peak, work, saved)}
    return exact | {"parameters": parameters, "operators": dict(sorted(operators.counts.items()))}


def measure_plans() -> dict[str, Figures]:
    """Idle slots of each pipeline schedule at four ranks and eight microbatches, a forward taking one slot."""
    found = {}
    for schedule in SCHEDULES:
        idle = bubble(simulate(schedule.plan(RANKS, MICROBATCHES), Times())).idle
        found[f"plan_{schedule.name}"] = {"bubble_slots": sum(idle)}
    return found


class Operators(TorchDispatchMode):
    """Counts the operators that run inside, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and go on."""
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))
