"""One small model per choice that changes what a Transformer computes; the contract holds for each of them."""

from dsv3.config import (
    MTP,
    Blocks,
    Everything,
    Fixed,
    Grouped,
    Indexer,
    Latent,
    Model,
    MoE,
    MultiHead,
    PerHead,
    QuadraticLoss,
    Rope,
    Select,
    Window,
    Yarn,
    vary,
)


def latent(*, q_lora_rank: int | None = 12, select: Select | None = None) -> Latent:
    return Latent(
        num_attention_heads=2,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=8,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=10,
        select=select or Everything(),
    )


BASE = Model(
    vocab_size=37,
    hidden_size=20,
    num_hidden_layers=3,
    intermediate_size=28,
    attention=latent(),
    moe=MoE(
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=7,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
    ),
    first_k_dense_replace=1,
    mtp=MTP(),
    max_position_embeddings=64,
    initializer_range=0.1,
)

INDEXER = Indexer(index_n_heads=3, index_head_dim=6, index_topk=5)

VARIANTS = {
    "deepseek_v3": BASE,
    "deepseek_v32": vary(BASE, attention=latent(select=INDEXER)),
    "deepseek_v32_warmup": vary(BASE, attention=latent(select=vary(INDEXER, stage="warmup"))),
    "plain_queries": vary(BASE, attention=latent(q_lora_rank=None)),
    "yarn": vary(BASE, rope=Rope(scaling=Yarn(factor=8, original_max_position_embeddings=8))),
    "multi_head": vary(BASE, attention=MultiHead(num_attention_heads=2, head_dim=6)),
    "grouped": vary(BASE, attention=Grouped(num_attention_heads=4, num_key_value_heads=2, head_dim=6)),
    "window": vary(BASE, attention=latent(select=Window(size=3, sink=1))),
    "per_head": vary(BASE, attention=MultiHead(num_attention_heads=2, head_dim=6, select=PerHead(keep=0.4))),
    "branch": vary(
        BASE,
        attention=MultiHead(
            num_attention_heads=2, head_dim=6, select=Blocks(k=3, block_q=1, block_k=2, learns="branch")
        ),
    ),
    "dense": vary(BASE, moe=None),
    "tied": vary(BASE, tie_word_embeddings=True),
    "two_ahead": vary(BASE, mtp=MTP(num_nextn_predict_layers=2, hidden="pre_norm")),
    "nothing_ahead": vary(BASE, mtp=None),
    "article": vary(
        BASE,
        attention=MultiHead(num_attention_heads=2, head_dim=6, select=PerHead(keep=0.3)),
        moe=MoE(
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=7,
            n_shared_experts=0,
            scoring_func="softmax",
            balance=(QuadraticLoss(),),
            capacity=Fixed(factor=1.2),
        ),
        first_k_dense_replace=0,
        mtp=None,
    ),
}
