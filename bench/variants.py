"""The models that the gate measures: a base and its variants, each with one choice changed.

So a figure that differs points at the choice. `bench.structure` says what is measured of them.
"""

from typing import Any

import torch
from torch import Tensor

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

BATCH, LENGTH, VOCABULARY = 2, 32, 256


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


def served() -> dict[str, Config]:
    """The variants that decode differently, by name."""
    every = variants()
    return {name: every[name] for name in ("base", "multi_head", "grouped", "window", "per_head")}


def drawn_tokens() -> Tensor:
    """The batch of every step, [B, T + 1]."""
    return torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
