"""Whole configs by name. Each is a function: read it to know the run, call `vary` on its result to change it.

tiny               trains past a bigram in minutes on two cores
small              about 40 million parameters
article            what the article describes, 67 billion parameters; it gives no widths, so those are ours
article_small      the article's choices at a size that trains here
deepseek_v2_lite   16 billion, as published
deepseek_v3        671 billion, as published
deepseek_v32       DeepSeek-V3.2: the same with sparse attention
"""

from collections.abc import Callable

from dsv3.config.attention import Indexer, Latent, MultiHead, PerHead
from dsv3.config.change import vary
from dsv3.config.layers import Rope, Yarn
from dsv3.config.model import MTP, Model
from dsv3.config.moe import Dropless, Fixed, MoE, QuadraticLoss, SequenceLoss, SignBias
from dsv3.config.rules import require
from dsv3.config.train import AdamW, Train
from dsv3.config.whole import Config


def tiny() -> Config:
    """DeepSeek-V3 in small: latent attention, one dense layer, biased sigmoid router, a shared expert, MTP.

    The selection bias moves five times as fast as DeepSeek-V3's: in 300 steps of 0.001 it could not correct a router.
    """
    model = Model(
        vocab_size=2048,
        hidden_size=128,
        num_hidden_layers=4,
        intermediate_size=384,
        first_k_dense_replace=1,
        attention=Latent(
            num_attention_heads=4,
            q_lora_rank=64,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
        ),
        moe=MoE(
            n_routed_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=64,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
            balance=(SignBias(rate=0.005), SequenceLoss()),
        ),
        mtp=MTP(),
        max_position_embeddings=1024,
        initializer_range=0.06,
        embedding_range=1.0,
    )
    return Config(model=model, train=Train(steps=300, batch_size=8, sequence_length=256, eval_every=50))


def small() -> Config:
    """About 40 million parameters, the same design as `tiny`."""
    model = Model(
        vocab_size=4096,
        hidden_size=384,
        num_hidden_layers=6,
        intermediate_size=1024,
        first_k_dense_replace=1,
        attention=Latent(
            num_attention_heads=6,
            q_lora_rank=192,
            kv_lora_rank=128,
            qk_nope_head_dim=64,
            qk_rope_head_dim=32,
            v_head_dim=64,
        ),
        moe=MoE(
            n_routed_experts=32,
            num_experts_per_tok=4,
            moe_intermediate_size=160,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
        ),
        mtp=MTP(),
        max_position_embeddings=2048,
        embedding_range=1.0,
    )
    return Config(model=model, train=Train(steps=2000, batch_size=16, sequence_length=512, optimizer=AdamW(lr=1.5e-3)))


def article() -> Config:
    """The article's design at its stated size: 128 experts, top-2, capacity 1.2, alpha 0.01, heads that keep 30%.

    It states 67 billion parameters and no width, depth, vocabulary or shared expert; those below were chosen to add up.
    """
    model = Model(
        vocab_size=102400,
        hidden_size=4096,
        num_hidden_layers=40,
        intermediate_size=16384,
        attention=MultiHead(num_attention_heads=32, head_dim=128, select=PerHead(keep=0.3)),
        moe=_article_experts(moe_intermediate_size=1008),
    )
    return Config(model=model, train=Train(batch_size=1024, sequence_length=4096, optimizer=AdamW(lr=2.2e-4)))


def article_small() -> Config:
    """The article's choices, unchanged, around a model that trains here."""
    model = Model(
        vocab_size=2048,
        hidden_size=128,
        num_hidden_layers=4,
        intermediate_size=384,
        attention=MultiHead(num_attention_heads=4, head_dim=32, select=PerHead(keep=0.3)),
        moe=_article_experts(moe_intermediate_size=64),
        max_position_embeddings=1024,
        initializer_range=0.06,
        embedding_range=1.0,
    )
    return Config(model=model, train=Train(steps=300, batch_size=8, sequence_length=256, eval_every=50))


def _article_experts(*, moe_intermediate_size: int) -> MoE:
    return MoE(
        n_routed_experts=128,
        num_experts_per_tok=2,
        moe_intermediate_size=moe_intermediate_size,
        n_shared_experts=0,
        scoring_func="softmax",
        norm_topk_prob=True,
        balance=(QuadraticLoss(alpha=0.01),),
        capacity=Fixed(factor=1.2),
    )


def deepseek_v2_lite() -> Config:
    """DeepSeek-V2-Lite, arXiv 2405.04434 appendix B: 15.7 billion parameters, 2.4 billion of them active."""
    model = Model(
        vocab_size=102400,
        hidden_size=2048,
        num_hidden_layers=27,
        intermediate_size=10944,
        first_k_dense_replace=1,
        attention=Latent(
            num_attention_heads=16,
            q_lora_rank=None,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
        ),
        moe=MoE(
            n_routed_experts=64,
            num_experts_per_tok=6,
            moe_intermediate_size=1408,
            n_shared_experts=2,
            scoring_func="softmax",
            norm_topk_prob=False,
            balance=(SequenceLoss(alpha=0.001),),
        ),
        rope=Rope(scaling=Yarn(factor=40, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707)),
        max_position_embeddings=163840,
    )
    return Config(model=model, train=Train(batch_size=4608, sequence_length=4096, optimizer=AdamW(lr=4.2e-4)))


def deepseek_v3() -> Config:
    """DeepSeek-V3, arXiv 2412.19437 section 4.2 and its config.json: 671 billion parameters, 37 billion active."""
    model = Model(
        vocab_size=129280,
        hidden_size=7168,
        num_hidden_layers=61,
        intermediate_size=18432,
        first_k_dense_replace=3,
        attention=Latent(
            num_attention_heads=128,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
        ),
        moe=MoE(
            n_routed_experts=256,
            num_experts_per_tok=8,
            moe_intermediate_size=2048,
            n_group=8,
            topk_group=4,
            routed_scaling_factor=2.5,
            balance=(SignBias(rate=0.001), SequenceLoss(alpha=0.0001)),
            capacity=Dropless(),
        ),
        mtp=MTP(),
        rope=Rope(scaling=Yarn(factor=40, original_max_position_embeddings=4096)),
        max_position_embeddings=163840,
    )
    return Config(model=model, train=Train(batch_size=15360, sequence_length=4096, optimizer=AdamW(lr=2.2e-4)))


def deepseek_v32() -> Config:
    """DeepSeek-V3.2, arXiv 2512.02556 section 2: DeepSeek-V3 whose tokens see the 2048 keys that an indexer selects."""
    indexer = Indexer(index_n_heads=64, index_head_dim=128, index_topk=2048)
    return vary(deepseek_v3(), **{"model.attention.select": indexer})


def every() -> dict[str, Callable[[], Config]]:
    """The presets by name, in the order of this file."""
    known = (tiny, small, article, article_small, deepseek_v2_lite, deepseek_v3, deepseek_v32)
    return {preset.__name__: preset for preset in known}


def named(name: str) -> Config:
    """The preset of that name.

    Raises:
        ValueError: for a name that is not a preset.
    """
    known = every()
    require(name in known, "preset", name, f"must be one of {', '.join(known)}", "pick one of these")
    return known[name]()
