"""Every bad value is refused where it is written: name, value, rule and remedy in one line."""

import pytest

from dsv3.config import (
    MTP,
    SGD,
    AdamW,
    Auto,
    Blocks,
    Config,
    Data,
    Fixed,
    Float8Block,
    Float16,
    Grouped,
    Hierarchical,
    Indexer,
    Latent,
    Model,
    MoE,
    MultiHead,
    PerHead,
    QuantileBias,
    Rope,
    Schedule,
    SignBias,
    Train,
    Window,
    Yarn,
    presets,
    vary,
)

EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 4}
LATENT = {"num_attention_heads": 2, "q_lora_rank": None, "kv_lora_rank": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
EXACT = MoE(**EXPERTS, balance=(QuantileBias(bins=None),))
INDEXER = Indexer(index_n_heads=2, index_head_dim=4, index_topk=3)

REFUSED = [
    (lambda: Fixed(factor=0), r"factor=0: must be a finite number > 0; "),
    (lambda: Fixed(factor=-1.2), r"factor=-1.2: "),
    (lambda: Fixed(factor=float("inf")), r"factor=inf: must be a finite number"),
    (lambda: Fixed(factor=1.2, policy="random"), r"policy='random': must be one of probability, position"),
    (lambda: MoE(**EXPERTS | {"num_experts_per_tok": 9}), r"num_experts_per_tok=9: must be at most the 8 experts"),
    (lambda: MoE(**EXPERTS, n_group=4, topk_group=1) and MoE(**EXPERTS, n_group=3), r"n_group=3: must divide"),
    (lambda: MoE(**EXPERTS, n_group=2, topk_group=3), r"topk_group=3: must be at most n_group=2"),
    (lambda: MoE(**EXPERTS, n_group=8, topk_group=8), r"n_group=8: a group is scored by its two best"),
    (lambda: MoE(**EXPERTS, n_shared_experts=-1), r"n_shared_experts=-1"),
    (lambda: MoE(**EXPERTS, n_shared_experts=1.5), r"n_shared_experts=1.5: must be a whole number of at least 0"),
    (lambda: MoE(**EXPERTS, scoring_func="relu"), r"scoring_func='relu'"),
    (lambda: MoE(**EXPERTS, balance=(SignBias(), SignBias())), r"names a method twice"),
    (lambda: MoE(**EXPERTS, balance=SignBias()), r"must be a tuple"),
    (lambda: MoE(**EXPERTS, capacity=1.2), r"capacity=1.2: must be one of Dropless, Fixed, Adaptive"),
    (lambda: SignBias(rate=float("nan")), r"rate=nan"),
    (lambda: PerHead(), r"exactly one of the two is set"),
    (lambda: PerHead(keep=0.3, k=4), r"exactly one of the two is set"),
    (lambda: PerHead(keep=0.0), r"keep=0.0: must be a finite number > 0"),
    (lambda: PerHead(keep=1.1), r"keep=1.1"),
    (lambda: PerHead(k=0), r"k=0: must be a whole number of at least 1"),
    (lambda: Auto(k=4, block_q=4, block_k=8, crossover=12), r"crossover=12: must be a multiple of 8, the larger block"),
    (lambda: Auto(k=4, crossover=-64), r"crossover=-64: "),
    (lambda: Auto(k=4, crossover=64, top_p=0.9), r"top_p=0.9: must be None"),
    (lambda: Auto(k=4, crossover=64, learns="gated"), r"learns='gated': must be 'nothing'"),
    (lambda: Indexer(index_n_heads=2, index_head_dim=4, index_topk=0), r"index_topk=0: must be a whole number of at"),
    (lambda: vary(INDEXER, index_n_heads=0), r"index_n_heads=0"),
    (lambda: vary(INDEXER, stage="dense"), r"stage='dense': must be one of warmup, sparse"),
    (lambda: vary(INDEXER, loss_weight=-1.0), r"loss_weight=-1.0"),
    (lambda: vary(INDEXER, loss_weight=0, stage="warmup"), r"loss_weight=0: must be above 0 in the warmup"),
    (lambda: vary(INDEXER, index_head_dim=1.5), r"index_head_dim=1.5"),
    (lambda: Latent(**LATENT, qk_rope_head_dim=2, select=INDEXER), r"q_lora_rank=None: must not be None: the indexer"),
    (
        lambda: Latent(**LATENT | {"q_lora_rank": 3}, qk_rope_head_dim=6, select=INDEXER),
        r"index_head_dim=4: must be at least qk_rope_head_dim=6",
    ),
    (lambda: MultiHead(num_attention_heads=2, head_dim=4, select=INDEXER), r"select=Indexer.*: must be one of Every"),
    (
        lambda: Grouped(num_attention_heads=2, num_key_value_heads=1, head_dim=4, select=INDEXER),
        r"select=Indexer.*: must be one of Everything, Window, PerHead, Blocks, Hierarchical, Auto;",
    ),
    (lambda: Blocks(), r"exactly one of the two is set; Blocks\(k=16\) or Blocks\(keep=0.3\)"),
    (lambda: Blocks(k=4, keep=0.3), r"exactly one of the two is set"),
    (lambda: Blocks(k=2), r"k=2: must be at least 3: the own, the previous and the first block are always seen"),
    (lambda: Blocks(k=5, block_q=256), r"k=5: must be at least 6"),
    (lambda: Blocks(keep=1.5), r"keep=1.5"),
    (lambda: Blocks(k=True), r"k=True"),
    (lambda: Blocks(k=16, top_p=0.0), r"top_p=0.0"),
    (lambda: Blocks(k=16, block_q=0), r"block_q=0"),
    (lambda: Blocks(k=16, block_q=48), r"\(block_q, block_k\)=\(48, 64\): one must divide the other"),
    (lambda: Blocks(k=16, sharing="heads"), r"sharing='heads': must be one of head, group, all"),
    (lambda: Blocks(k=16, rotated=1), r"rotated=1"),
    (lambda: Blocks(k=16, learns="gate"), r"learns='gate': must be one of nothing, branch, distilled, gated, entmax"),
    (lambda: Blocks(k=16, learns="distilled", loss_weight=0), r"loss_weight=0: must be above 0: nothing else is dist"),
    (lambda: Blocks(k=16, loss_weight=-1.0), r"loss_weight=-1.0"),
    (
        lambda: Hierarchical(k=16, search="best_first", learns="entmax"),
        r"search='best_first': must be 'beam' where learns='entmax': keys learn to be found by their mean",
    ),
    (
        lambda: Latent(**LATENT, qk_rope_head_dim=4, select=Blocks(k=16, learns="branch")),
        r"select.learns='branch': must be 'nothing' with Latent",
    ),
    (lambda: Hierarchical(), r"Hierarchical\(k=16\)"),
    (lambda: Hierarchical(k=16, branching=1), r"branching=1: must be at least 2"),
    (lambda: Hierarchical(k=16, search="depth_first"), r"search='depth_first': must be one of beam, best_first"),
    (lambda: Hierarchical(k=16, width=0), r"width=0"),
    (lambda: Window(size=0), r"size=0"),
    (lambda: Window(size=4, sink=-1), r"sink=-1"),
    (lambda: MultiHead(num_attention_heads=2, head_dim=3), r"head_dim=3: must be even"),
    (lambda: MultiHead(num_attention_heads=True, head_dim=4), r"num_attention_heads=True"),
    (lambda: MultiHead(num_attention_heads=2, head_dim=4, select="all"), r"select='all'"),
    (lambda: Grouped(num_attention_heads=4, num_key_value_heads=3, head_dim=4), r"num_key_value_heads=3: must divide"),
    (lambda: Latent(**LATENT, qk_rope_head_dim=5), r"qk_rope_head_dim=5: must be even"),
    (lambda: Latent(**LATENT | {"q_lora_rank": 0}, qk_rope_head_dim=4), r"q_lora_rank=0"),
    (lambda: Rope(theta=1.0), r"theta=1.0"),
    (lambda: Yarn(factor=0.5, original_max_position_embeddings=8), r"factor=0.5"),
    (lambda: MTP(num_nextn_predict_layers=0), r"num_nextn_predict_layers=0"),
    (lambda: MTP(hidden="post"), r"hidden='post'"),
    (lambda: Float16(growth_interval=0), r"growth_interval=0"),
    (lambda: Float8Block(format="e3m4"), r"format='e3m4'"),
    (lambda: AdamW(lr=0.0), r"lr=0.0"),
    (lambda: AdamW(beta2=1.0), r"beta2=1.0"),
    (lambda: SGD(lr=-1.0), r"lr=-1.0"),
    (lambda: Schedule(warmup=0.7, decay=0.7), r"warmup \+ decay=1.4"),
    (lambda: Train(steps=0), r"steps=0"),
    (lambda: Train(batch_size=6, accumulation_steps=4), r"accumulation_steps=4: must divide batch_size=6"),
    (lambda: Train(precision="fp8"), r"precision='fp8'"),
    (lambda: QuantileBias(bins=0), r"bins=0: must be a whole number of at least 1"),
    (
        lambda: vary(presets.tiny(), **{"model.moe": EXACT, "train.accumulation_steps": 2}),
        r"train.accumulation_steps=2: must be 1 with QuantileBias\(bins=None\), which needs all scores",
    ),
    (lambda: Data(validation=0.0), r"validation=0.0"),
    (lambda: vary(presets.tiny(), **{"model.first_k_dense_replace": 9}), r"first_k_dense_replace=9"),
    (lambda: vary(presets.tiny(), **{"model.attention": None}), r"attention=None"),
    (lambda: vary(presets.tiny(), **{"model.moe": 4}), r"moe=4: must be None or MoE"),
    (lambda: vary(presets.tiny(), **{"train.sequence_length": 4096}), r"sequence_length=4096: must be at most"),
    (lambda: vary(presets.tiny(), **{"train.sequence_length": 1}), r"sequence_length=1: must exceed the 1 tokens"),
    (lambda: presets.named("huge"), r"preset='huge': must be one of tiny, small"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_a_bad_value_is_refused_with_its_name_and_the_rule(make, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert ";" in str(caught.value), "the message ends with a remedy"


def test_experts_begin_after_the_dense_layers() -> None:
    model = presets.tiny().model
    assert [model.is_moe_layer(layer) for layer in range(5)] == [False, True, True, True, True]


def test_a_model_without_experts_has_no_moe_layer() -> None:
    model = vary(presets.tiny().model, moe=None)
    assert isinstance(model, Model)
    assert not any(model.is_moe_layer(layer) for layer in range(5))


@pytest.mark.parametrize("name", presets.every())
def test_every_preset_is_a_whole_config(name: str) -> None:
    assert isinstance(presets.named(name), Config)
