"""What the gate measures: training steps of a base model and its variants, a prompt, a token.

Each variant has one choice changed, so a figure that differs points at the choice. `bench.structure` and
`bench.instructions` say what is measured. Each config and each state is made only when it is asked for, so that an
older dsv3, which lacks some choice, can still serve the other cases.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv3.attention import KeyValueCache
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
from dsv3.model import Transformer
from dsv3.train.state import TrainState
from dsv3.train.step import train_step

BATCH, LENGTH, VOCABULARY = 2, 32, 256
SERVED = ("base", "multi_head", "grouped", "window", "per_head")  # the variants that decode differently
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Work:
    """A piece of work: `build` makes its state anew, `call` does it; what happens once only is in the first call."""

    build: Callable[[], Any]
    call: Callable[[Any], object]


def works() -> dict[str, Callable[[], Work]]:
    """Every piece of work by name: training steps under their variant's name, then serving."""
    steps: dict[str, Callable[[], Work]] = {name: partial(_training, name) for name in changes()}
    return steps | {f"{phase}_{name}": partial(_serving, name, phase) for name in SERVED for phase in PHASES}


def training_step(config: Config) -> Work:
    """One training step of a fresh model on generated tokens."""
    return Work(
        build=lambda: (TrainState.create(config, seed=0), drawn_tokens()), call=lambda built: train_step(*built)
    )


def serving(config: Config, *, decode: bool) -> Work:
    """Reading a prompt into an empty cache, or one token after it."""
    rows = drawn_tokens()
    prompt, token = rows[:, :-1], rows[:, -1:]

    def build() -> tuple[Transformer, KeyValueCache]:
        model = Transformer(config.model, seed=0).eval()
        cache = KeyValueCache.empty(config.model, len(rows), rows.shape[1])
        with torch.inference_mode():
            filled = model(prompt, cache=cache).cache if decode else cache
        return model, filled

    def serve(built: tuple[Transformer, KeyValueCache]) -> None:
        model, cache = built
        with torch.inference_mode():
            model(token if decode else prompt, cache=cache)

    return Work(build=build, call=serve)


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
    return {name: variant(name) for name in changes()}


def variant(name: str) -> Config:
    """One of them."""
    return vary(base(), **changes()[name]())


def changes() -> dict[str, Callable[[], dict[str, Any]]]:
    """What each variant changes of the base."""
    return {
        "base": dict,
        "multi_head": lambda: {"model.attention": multi_head(Everything())},
        "grouped": lambda: {
            "model.attention": Grouped(num_attention_heads=4, num_key_value_heads=2, head_dim=16),
        },
        "window": lambda: {"model.attention": multi_head(Window(size=8))},
        "per_head": lambda: {"model.attention": multi_head(PerHead(keep=0.3))},
        "dense": lambda: {"model.moe": None},
        "softmax_router": lambda: {"model.moe.scoring_func": "softmax"},
        "quadratic_loss": lambda: {"model.moe.balance": (QuadraticLoss(),)},
        "switch_loss": lambda: {"model.moe.balance": (SwitchLoss(),)},
        "capacity_by_probability": lambda: {"model.moe.capacity": Fixed(factor=1.2)},
        "capacity_by_position": lambda: {"model.moe.capacity": Fixed(factor=1.2, policy="position")},
        "multi_token_prediction": lambda: {"model.mtp": MTP()},
        "accumulation": lambda: {"train.accumulation_steps": 2},
        "bfloat16": lambda: {"train.precision": BFloat16()},
        "float16": lambda: {"train.precision": Float16()},
        "float8_block": lambda: {"train.precision": Float8Block()},
    }


def multi_head(select: Select) -> MultiHead:
    """Plain attention of the base's width under a selector."""
    return MultiHead(num_attention_heads=4, head_dim=16, select=select)


def drawn_tokens() -> Tensor:
    """The batch of every step, [B, T + 1]."""
    return torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def _training(name: str) -> Work:
    return training_step(variant(name))


def _serving(name: str, phase: str) -> Work:
    return serving(variant(name), decode=phase == "decode")
