"""A config with every part in the smallest size, a text to train it on and a cache for it, and how far two tensors are
apart.
"""

import random
from pathlib import Path
from typing import Any

import torch

from dsv3.config import (
    MTP,
    SGD,
    Balance,
    Config,
    Data,
    Latent,
    Model,
    MoE,
    Schedule,
    SequenceLoss,
    SignBias,
    Train,
    vary,
)
from dsv3.data.prepare import cache_folder

VOCABULARY = 300


def config(balance: tuple[Balance, ...] = (SignBias(rate=0.01), SequenceLoss(alpha=0.01)), **changes: Any) -> Config:
    """Latent attention, one dense layer, one with four experts, one token further ahead; plain SGD without clipping."""
    moe = MoE(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, balance=balance)
    attention = Latent(
        num_attention_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4
    )
    model = Model(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        intermediate_size=24,
        first_k_dense_replace=1,
        attention=attention,
        moe=moe,
        mtp=MTP(),
        max_position_embeddings=64,
        initializer_range=0.3,  # wide, so that experts are told apart
    )
    train = Train(
        steps=10,
        batch_size=4,
        sequence_length=8,
        optimizer=SGD(lr=0.05),
        schedule=Schedule(warmup=0.0, decay=0.0),
        clip_grad_norm=1e6,
        eval_every=10,
        eval_sequences=4,
        checkpoint_every=10,
    )
    return vary(Config(model=model, train=train), **changes)


def rows(config: Config, seed: int = 0, batches: int = 1) -> list[torch.Tensor]:
    """Random global batches."""
    generator = torch.Generator().manual_seed(seed)
    shape = (config.train.batch_size, config.train.sequence_length + 1)
    return [torch.randint(0, VOCABULARY, shape, generator=generator) for _ in range(batches)]


def cache(folder: Path) -> str:
    """A user's cache without texts; its kernels are those that this machine has built, which takes minutes."""
    built = cache_folder() / "kernels"
    built.mkdir(parents=True, exist_ok=True)
    (folder / "dsv3").mkdir(parents=True)
    (folder / "dsv3" / "kernels").symlink_to(built)
    return str(folder)


def book(folder: Path, words: int = 20_000) -> Data:
    """A file of words that follow each other with some regularity."""
    draw = random.Random(0)
    vocabulary = [f"{first}{second}" for first in "bdfgkl" for second in ("ado", "eno", "iru", "osa")]
    text = " ".join(draw.choice(vocabulary) + ("\n\n" if draw.random() < 0.02 else "") for _ in range(words))
    (folder / "book.txt").write_text(text)
    return Data(paths=(str(folder / "book.txt"),), validation=0.2, test=0.2)


def relative_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """The norm of the difference over the norm of the first."""
    return ((first - second).norm() / first.norm()).item()


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """All values as one float64 vector."""
    return torch.cat([tensor.double().flatten() for tensor in tensors.values()])
