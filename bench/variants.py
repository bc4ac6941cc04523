"""What the gate measures: training steps of a base model and its variants, a prompt, a token.

Most variants have one choice changed, so a figure that differs points at the choice; a few change several that do not
hide each other, to save time. Together they have every choice of `dsv3.config` that a step can tell apart: a test names
those that are missing. `bench.structure` and `bench.instructions` say what is measured. Each config and each state is
made only when it is asked for, so that an older dsv3, which lacks some choice, can still serve the other cases.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv3 import config as choices
from dsv3.attention import KeyValueCache
from dsv3.config import Config, presets, vary
from dsv3.model import Transformer
from dsv3.train.state import TrainState
from dsv3.train.step import train_step

BATCH, LENGTH, VOCABULARY = 2, 32, 256
# the variants that decode differently
SERVED = (
    *("base", "multi_head", "grouped", "window", "per_head"),
    *("blocks", "beam", "auto", "latent_blocks", "latent_per_head", "indexer"),
)
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
            "model.attention": latent(),
            "model.moe": choices.MoE(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32),
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
    return attentions() | expert_layers() | trainings()


def attentions() -> dict[str, Callable[[], dict[str, Any]]]:
    """Kinds of attention, and which keys they see. Blocks of 4 or 8 keys leave the base's 32 tokens a choice."""
    four: dict[str, Any] = {"block_q": 4, "block_k": 4}
    return {
        "base": dict,
        "multi_head": lambda: {"model.attention": multi_head()},
        "grouped": lambda: {"model.attention": grouped()},
        "window": lambda: {"model.attention": multi_head(select=choices.Window(size=8))},
        "per_head": lambda: {"model.attention": multi_head(select=choices.PerHead(keep=0.3))},
        # each token chooses; below, the one that is decoded takes up what its block has chosen
        "blocks": lambda: {"model.attention": multi_head(select=choices.Blocks(k=4, block_q=1, block_k=4))},
        "beam": lambda: {
            "model.attention": grouped(
                select=choices.Hierarchical(keep=0.6, branching=2, width=3, sharing="group", **four)
            )
        },
        "best_first": lambda: {
            "model.attention": multi_head(
                select=choices.Hierarchical(k=5, branching=2, search="best_first", top_p=0.9, **four)
            )
        },
        "auto": lambda: {"model.attention": multi_head(select=choices.Auto(k=4, branching=2, crossover=24, **four))},
        "latent_blocks": lambda: {
            "model.attention": latent(
                q_lora_rank=None, select=choices.Blocks(k=5, block_q=8, block_k=4, sharing="all", rotated=False)
            )
        },
        "blocks_branch": lambda: learning("branch"),
        "blocks_distilled": lambda: learning("distilled"),
        "blocks_gated": lambda: learning("gated"),
        "blocks_entmax": lambda: learning("entmax"),
        "latent_per_head": lambda: {"model.attention": latent(select=choices.PerHead(k=8))},
        "indexer": lambda: {"model.attention.select": indexer()},
        "indexer_warmup": lambda: {"model.attention.select": indexer(stage="warmup")},
        # long enough for the C++ kernel; where it cannot be built this is the plain path, and the key says so
        "block_kernel": lambda: {"model.attention": multi_head(select=choices.Blocks(k=3, block_q=16, block_k=16))},
    }


def expert_layers() -> dict[str, Callable[[], dict[str, Any]]]:
    """Routers, balance and capacity."""
    return {
        "dense": lambda: {"model.moe": None},
        "softmax_router": lambda: {"model.moe.scoring_func": "softmax"},
        "quadratic_loss": lambda: {"model.moe.balance": (choices.QuadraticLoss(),)},
        "switch_loss": lambda: {"model.moe.balance": (choices.SwitchLoss(),)},
        "proportional_bias": lambda: {"model.moe.balance": (choices.ProportionalBias(),)},
        "centred_sign_bias": lambda: {"model.moe.balance": (choices.CentredSignBias(),)},
        "quantile_bias": lambda: {"model.moe.balance": (choices.QuantileBias(bins=64),)},
        "quantile_exact": lambda: {"model.moe.balance": (choices.QuantileBias(bins=None),)},
        "similarity_loss": lambda: {"model.moe.balance": (choices.SimilarityLoss(),)},
        "expert_choice": lambda: {"model.moe.balance": (choices.ExpertChoice(),)},
        "z_loss": lambda: {"model.moe.balance": (choices.SignBias(), choices.ZLoss())},
        "capacity_by_probability": lambda: {"model.moe.capacity": choices.Fixed(factor=1.2)},
        "capacity_by_position": lambda: {"model.moe.capacity": choices.Fixed(factor=1.2, policy="position")},
        "capacity_reroute": lambda: {"model.moe.capacity": choices.Fixed(factor=1.2, policy="reroute")},
        "capacity_adaptive": lambda: {"model.moe.capacity": choices.Adaptive()},
        "capacity_adaptive_by_position": lambda: {"model.moe.capacity": choices.Adaptive(policy="position")},
        "capacity_adaptive_reroute": lambda: {"model.moe.capacity": choices.Adaptive(policy="reroute")},
        "deepseek_v3": lambda: {
            "model.moe.n_group": 4,
            "model.moe.topk_group": 2,
            "model.moe.routed_scaling_factor": 2.5,
            "model.rope": choices.Rope(scaling=choices.Yarn(factor=40, original_max_position_embeddings=4096)),
            "model.mtp": choices.MTP(hidden="pre_norm"),
        },
        "plain": lambda: {
            "model.moe.n_shared_experts": 0,
            "model.moe.norm_topk_prob": False,
            "model.moe.balance": (),
            "model.tie_word_embeddings": True,
            "train.optimizer": choices.SGD(),
        },
    }


def trainings() -> dict[str, Callable[[], dict[str, Any]]]:
    """What is predicted, in how many parts, and in which numbers."""
    return {
        "multi_token_prediction": lambda: {"model.mtp": choices.MTP()},
        "accumulation": lambda: {"train.accumulation_steps": 2},
        "bfloat16": lambda: {"train.precision": choices.BFloat16()},
        "float16": lambda: {"train.precision": choices.Float16()},
        "float8_block": lambda: {"train.precision": choices.Float8Block()},
        "float8_e5m2": lambda: {
            "model.moe": None,  # experts are cast as other layers are, one by one, which takes long
            "train.precision": choices.Float8Block(format="e5m2", scale="ue8m0"),
        },
    }


def multi_head(**changed: Any) -> "choices.MultiHead":
    """Plain attention of the base's width."""
    return choices.MultiHead(num_attention_heads=4, head_dim=16, **changed)


def grouped(**changed: Any) -> "choices.Grouped":
    """The same with keys and values shared by two heads each."""
    return choices.Grouped(num_attention_heads=4, num_key_value_heads=2, head_dim=16, **changed)


def latent(**changed: Any) -> "choices.Latent":
    """The base's attention."""
    sizes = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    return choices.Latent(num_attention_heads=4, **sizes | changed)


def learning(way: str) -> dict[str, Any]:
    """A choice of blocks that learns, of 5 of the base's 8, so that a tree has some to leave out."""
    select = choices.Hierarchical(k=5, block_q=1, block_k=4, branching=2, learns=way)  # type: ignore[arg-type]
    return {"model.attention": multi_head(select=select)}


def indexer(**changed: Any) -> "choices.Indexer":
    """DeepSeek-V3.2's selection, of a quarter of the base's tokens."""
    return choices.Indexer(index_n_heads=4, index_head_dim=16, index_topk=8, **changed)


def drawn_tokens() -> Tensor:
    """The batch of every step, [B, T + 1]."""
    return torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))


def _training(name: str) -> Work:
    return training_step(variant(name))


def _serving(name: str, phase: str) -> Work:
    return serving(variant(name), decode=phase == "decode")
