"""Random valid configs, for the properties that hold for all of them."""

from hypothesis import strategies as st

from dsv3.config import (
    MTP,
    SGD,
    AdamW,
    Adaptive,
    Auto,
    BFloat16,
    Bias,
    Blocks,
    CentredSignBias,
    Config,
    Dropless,
    Everything,
    Fixed,
    Float8Block,
    Float16,
    Float32,
    Grouped,
    Hierarchical,
    Indexer,
    Latent,
    Model,
    MoE,
    MultiHead,
    PerHead,
    ProportionalBias,
    QuadraticLoss,
    Rope,
    SequenceLoss,
    SignBias,
    SimilarityLoss,
    SwitchLoss,
    Train,
    Window,
    Yarn,
    ZLoss,
    vary,
)

share = st.floats(0.01, 1.0)
small = st.integers(1, 6)
even = small.map(lambda n: 2 * n)

selects = st.one_of(
    st.builds(Everything),
    st.builds(Window, size=small, sink=st.integers(0, 3)),
    st.builds(PerHead, keep=share),
    st.builds(PerHead, k=small),
    st.builds(Blocks, k=st.integers(3, 20), sharing=st.sampled_from(["head", "group", "all"])),
    st.builds(Hierarchical, keep=share, top_p=st.none() | share, block_q=st.sampled_from([1, 8]), block_k=st.just(4)),
    st.builds(Hierarchical, k=st.integers(3, 20), branching=st.integers(2, 9), rotated=st.booleans()),
    st.builds(
        Auto, k=st.integers(3, 20), block_q=st.just(4), block_k=st.just(4), crossover=st.sampled_from([0, 4, 16])
    ),
)
multi_head = st.builds(MultiHead, num_attention_heads=small, head_dim=even, select=selects)
grouped = st.builds(
    lambda groups, heads, dim, select: Grouped(
        num_attention_heads=groups * heads, num_key_value_heads=groups, head_dim=dim, select=select
    ),
    small,
    small,
    even,
    selects,
)
plain_latent = st.builds(
    Latent,
    num_attention_heads=small,
    q_lora_rank=st.none() | small,
    kv_lora_rank=small,
    qk_nope_head_dim=small,
    qk_rope_head_dim=even,
    v_head_dim=small,
    select=selects,
)
indexed = st.builds(
    lambda attention, rank, further, **choice: vary(
        attention,
        q_lora_rank=rank,
        select=Indexer(index_head_dim=attention.qk_rope_head_dim + further, **choice),
    ),
    plain_latent,
    small,
    st.integers(0, 3),
    index_n_heads=small,
    index_topk=small,
    stage=st.sampled_from(["warmup", "sparse"]),
    loss_weight=share,
)
latent = plain_latent | indexed
attentions = st.one_of(multi_head, grouped, latent)
balances = st.lists(
    st.one_of(
        st.builds(SignBias, rate=share)
        | st.builds(CentredSignBias, rate=share)
        | st.builds(ProportionalBias, rate=share),
        st.builds(SequenceLoss, alpha=share),
        st.builds(SwitchLoss, alpha=share),
        st.builds(QuadraticLoss, alpha=share),
        st.builds(SimilarityLoss, alpha=share),
        st.builds(ZLoss, alpha=share),
    ),
    max_size=6,
    unique_by=lambda method: Bias if isinstance(method, Bias) else type(method),
).map(tuple)
policies = st.sampled_from(["probability", "position", "reroute"])
capacities = st.one_of(
    st.builds(Dropless),
    st.builds(Fixed, factor=st.floats(0.1, 4.0), policy=policies),
    st.builds(Adaptive, momentum=st.floats(0.0, 0.99), policy=policies),
)


@st.composite
def moes(draw: st.DrawFn) -> MoE:
    n_group, per_group = draw(small), draw(st.integers(2, 5))
    topk_group = draw(st.integers(1, n_group))
    return MoE(
        n_routed_experts=n_group * per_group,
        num_experts_per_tok=draw(st.integers(1, topk_group * per_group)),
        moe_intermediate_size=draw(small),
        n_shared_experts=draw(st.integers(0, 2)),
        scoring_func=draw(st.sampled_from(["sigmoid", "softmax"])),
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(share),
        balance=draw(balances),
        capacity=draw(capacities),
    )


yarns = st.builds(Yarn, factor=st.integers(1, 40), original_max_position_embeddings=small)
ropes = st.builds(Rope, theta=st.floats(2.0, 1e6), scaling=st.none() | yarns)
mtps = st.builds(MTP, num_nextn_predict_layers=st.integers(1, 3), hidden=st.sampled_from(["pre_norm", "post_norm"]))


@st.composite
def models(draw: st.DrawFn) -> Model:
    layers = draw(small)
    return Model(
        vocab_size=draw(st.integers(2, 64)),
        hidden_size=draw(even),
        num_hidden_layers=layers,
        intermediate_size=draw(small),
        attention=draw(attentions),
        moe=draw(st.none() | moes()),
        first_k_dense_replace=draw(st.integers(0, layers)),
        mtp=draw(st.none() | mtps),
        rope=draw(ropes),
        tie_word_embeddings=draw(st.booleans()),
        embedding_range=draw(st.none() | share),
    )


precisions = st.one_of(
    st.builds(Float32),
    st.builds(BFloat16),
    st.builds(Float16, growth_interval=small),
    st.builds(Float8Block, format=st.sampled_from(["e4m3", "e5m2"]), scale=st.sampled_from(["fp32", "ue8m0"])),
)
optimizers = st.one_of(st.builds(AdamW, lr=share), st.builds(SGD, lr=share))
trains = st.builds(
    lambda parts, per_part, steps, optimizer, precision: Train(
        steps=steps,
        batch_size=parts * per_part,
        accumulation_steps=parts,
        sequence_length=16,
        optimizer=optimizer,
        precision=precision,
    ),
    small,
    small,
    small,
    optimizers,
    precisions,
)
configs = st.builds(Config, model=models(), train=trains)
