"""Numbers that were worked out elsewhere: published sizes, and small cases by hand."""

import pytest
import torch
from torch.nn import functional as F

from dsv3.attention import LatentAttention
from dsv3.config import (
    Blocks,
    Everything,
    Grouped,
    Hierarchical,
    Indexer,
    Latent,
    MultiHead,
    PerHead,
    Select,
    Window,
    presets,
    vary,
)
from dsv3.model import Transformer, cost
from tests.model.variants import BASE

V3 = presets.deepseek_v3().model
V32 = presets.deepseek_v32().model
LITE = presets.deepseek_v2_lite().model


@pytest.mark.parametrize(
    "within, expected",
    [
        ("", 671_026_404_352),
        ("layers.0", 583_483_392),
        ("layers.2", 583_483_392),
        ("layers.3", 11_507_286_016),
        ("layers.60", 11_507_286_016),
        ("layers.3.self_attn", 187_107_328),
        ("layers.3.self_attn.q_a_proj", 11_010_048),
        ("layers.3.self_attn.q_a_layernorm", 1_536),
        ("layers.3.self_attn.q_b_proj", 37_748_736),
        ("layers.3.self_attn.kv_a_proj_with_mqa", 4_128_768),
        ("layers.3.self_attn.kv_a_layernorm", 512),
        ("layers.3.self_attn.kv_b_proj", 16_777_216),
        ("layers.3.self_attn.o_proj", 117_440_512),
        ("layers.3.mlp.gate", 1_835_008),
        ("layers.3.mlp.experts", 256 * 44_040_192),
        ("layers.3.mlp.shared_experts", 44_040_192),
        ("embed_tokens", 926_679_040),
        ("lm_head", 926_679_040),
    ],
)
def test_deepseek_v3_has_its_published_sizes(within: str, expected: int) -> None:
    """Counted on transformers' meta-device model and by hand from the published widths."""
    assert cost.parameters(V3, within=within, mtp=False) == expected


def test_deepseek_v3_on_the_meta_device_has_those_sizes_too() -> None:
    with torch.device("meta"):
        model = Transformer(vary(V3, mtp=None))
    assert sum(p.numel() for p in model.parameters()) == 671_026_404_352
    assert sum(p.numel() for p in model.layers[3].self_attn.parameters()) == 187_107_328
    assert sum(p.numel() for p in model.layers[3].parameters()) == 11_507_286_016
    assert sum(p.numel() for p in model.layers[0].parameters()) == 583_483_392
    assert sum(b.numel() for b in model.buffers()) == 58 * 256


@pytest.mark.parametrize(
    "within, expected",
    [
        ("", 671_877_929_216),
        ("layers.0.self_attn", 187_107_328 + 13_959_424),
        ("layers.60.self_attn.indexer", 13_959_424),
        ("layers.60.self_attn.indexer.wq_b", 8192 * 1536),
        ("layers.60.self_attn.indexer.wk", 128 * 7168),
        ("layers.60.self_attn.indexer.k_norm", 2 * 128),
        ("layers.60.self_attn.indexer.weights_proj", 64 * 7168),
    ],
)
def test_deepseek_v32_has_its_published_sizes(within: str, expected: int) -> None:
    """Counted on transformers' meta-device model; an indexer's by hand from the published widths."""
    assert cost.parameters(V32, within=within, mtp=False) == expected


def test_deepseek_v32_on_the_meta_device_has_those_sizes_too() -> None:
    with torch.device("meta"):
        model = Transformer(vary(V32, mtp=None))
    assert sum(p.numel() for p in model.parameters()) == 671_877_929_216
    assert sum(p.numel() for p in model.layers[60].self_attn.indexer.parameters()) == 13_959_424
    assert sum(b.numel() for b in model.buffers()) == 58 * 256


def test_deepseek_v3_activates_37_billion_parameters_per_token() -> None:
    assert cost.active_parameters(V3, mtp=False) == 37_552_282_624
    assert cost.active_parameters(V3, embedding=False, mtp=False) == 36_625_603_584


def test_the_mtp_module_of_deepseek_v3_is_one_more_expert_layer() -> None:
    """Three norms more than a block, and eh_proj of 14336 x 7168; the published 11.5 billion are the block's."""
    assert cost.parameters(V3, within="mtp") == 11_507_286_016 + 3 * 7168 + 14336 * 7168
    assert cost.parameters(V3, within="mtp.0.block") == 11_507_286_016


def test_deepseek_v2_lite_counts_what_transformers_counts() -> None:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    attention, moe = LITE.attention, LITE.moe
    assert isinstance(attention, Latent)
    assert moe is not None
    config = DeepseekV2Config(
        vocab_size=LITE.vocab_size,
        hidden_size=LITE.hidden_size,
        intermediate_size=LITE.intermediate_size,
        moe_intermediate_size=moe.moe_intermediate_size,
        num_hidden_layers=LITE.num_hidden_layers,
        num_attention_heads=attention.num_attention_heads,
        num_key_value_heads=attention.num_attention_heads,
        n_shared_experts=moe.n_shared_experts,
        n_routed_experts=moe.n_routed_experts,
        kv_lora_rank=attention.kv_lora_rank,
        q_lora_rank=None,
        qk_rope_head_dim=attention.qk_rope_head_dim,
        v_head_dim=attention.v_head_dim,
        qk_nope_head_dim=attention.qk_nope_head_dim,
        first_k_dense_replace=1,
    )
    with torch.device("meta"):
        theirs = DeepseekV2ForCausalLM(config)
    assert cost.parameters(LITE) == sum(p.numel() for p in theirs.parameters())
    first = theirs.model.layers[1]
    assert cost.parameters(LITE, within="layers.1") == sum(p.numel() for p in first.parameters())


def test_presets_have_the_sizes_that_they_are_named_for() -> None:
    assert cost.parameters(presets.article().model) == pytest.approx(67e9, rel=0.005)
    small = presets.small().model
    # the name stands between the count without and with its module of multi-token prediction
    assert cost.parameters(small, mtp=False) < 40e6 < cost.parameters(small) < 45e6


def test_cache_bytes_per_token() -> None:
    """DeepSeek-V3: 61 layers x (512 + 64) numbers x 2 bytes. arXiv 2505.09343 quotes 70.272 KB, and 516.096 for 126
    layers of 2 x 8 x 128.
    """
    assert cost.kv_bytes_per_token(V3) == 70_272
    assert cost.kv_bytes_per_token(V32) == 70_272 + 61 * 128 * 2
    llama = vary(
        V3, num_hidden_layers=126, attention=Grouped(num_attention_heads=128, num_key_value_heads=8, head_dim=128)
    )
    assert cost.kv_bytes_per_token(llama) == 516_096
    full = MultiHead(num_attention_heads=128, head_dim=128)
    assert cost.kv_values_per_token(full) == 2 * 128 * 128
    sparse = MultiHead(num_attention_heads=128, head_dim=128, select=PerHead(keep=0.3))
    assert cost.kv_values_per_token(sparse) == 2 * 128 * 128 + 128


def test_deepseek_v3_trains_at_250_gigaflop_per_token() -> None:
    """385 TFLOP/s (causal) at 1541.7 tokens/s per GPU, arXiv 2505.09343 table 4, are 249.7; here 6 x 36.6e9 + causal
    scores.
    """
    per_token = cost.flops_per_token(V3, 4096, training=True, mtp=False)
    scores = 6 * 61 * 40_960 * (4096 + 1) / 2
    norms = 61 * (2 * 7168 + 1536 + 512) + 7168
    assert per_token == 6 * (36_625_603_584 - norms) + scores
    assert per_token == pytest.approx(249.7e9, rel=0.005)


@pytest.mark.parametrize(
    "length, dense, absorbed, expanded",
    [(4096, 83.9, 230.7, 79.7), (16384, 335.6, 334.5, 145.7), (131072, 2684, 820, 620)],
)
def test_deepseek_v32_attends_for_these_million_multiply_adds_per_token(
    length: int, dense: float, absorbed: float, expanded: float
) -> None:
    """Per layer, worked out by hand; there the indexer scores all pairs, and adding up its 64 heads is free."""
    select = V32.attention.select
    assert isinstance(select, Indexer)
    pairs = cost.index_flops(select, 1, length) / 2 / 64 / 129 + 2048 * 2049 / 2
    index, kept = 64 * 128 * pairs / length, cost.kept_pairs(select, length) / length
    assert cost.attention_flops(V3.attention, length) / 2e6 / length == pytest.approx(dense, rel=1e-3)
    for in_latent_space, expected in ((True, absorbed), (False, expanded)):
        core = kept * cost.macs_per_pair(V32.attention, absorbed=in_latent_space)
        assert (core + index) / 1e6 == pytest.approx(expected, rel=1e-3)


def test_multiply_adds_per_pair_of_both_forms_of_latent_attention() -> None:
    assert cost.macs_per_pair(V3.attention) == 40_960
    assert cost.macs_per_pair(V3.attention, absorbed=True) == 139_264


@pytest.mark.parametrize(
    "select, by_hand",
    [
        (Everything(), 1 + 2 + 3 + 4 + 5 + 6 + 7),
        (Window(size=2, sink=1), 1 + 2 + 3 + 3 + 3 + 3 + 3),
        (PerHead(k=3), 1 + 2 + 3 + 3 + 3 + 3 + 3),
        (PerHead(keep=0.3), 1 + 1 + 1 + 1 + 1 + 1 + 2),
        (Indexer(index_n_heads=1, index_head_dim=2, index_topk=4), 1 + 2 + 3 + 4 + 4 + 4 + 4),
        (Blocks(k=4, block_q=2, block_k=1), 1 + 2 + 3 + 4 + 3 + 4 + 3),
        (Hierarchical(k=3, block_q=1, block_k=2), 1 + 2 + 3 + 4 + 5 + 6 + 5),
    ],
)
def test_kept_pairs_of_seven_tokens(select: Select, by_hand: int) -> None:
    assert cost.kept_pairs(select, 7) == by_hand


@pytest.mark.parametrize(
    "select",
    [
        Window(size=2, sink=1),
        Window(size=5),
        PerHead(k=3),
        PerHead(keep=0.3),
        PerHead(keep=0.7),
        Blocks(k=4, block_q=4, block_k=2),
        Hierarchical(keep=0.4, block_q=2, block_k=4),
        Hierarchical(k=3, block_q=1, block_k=4, search="best_first"),
    ],
)
def test_kept_pairs_are_those_that_the_selectors_count(select: Select) -> None:
    config = vary(BASE, attention=MultiHead(num_attention_heads=2, head_dim=4, select=select), mtp=None)
    selection = Transformer(config)(torch.zeros(1, 29, dtype=torch.long)).selection[0]
    assert selection is not None
    heads = 1 if isinstance(select, Window) else 2
    assert selection.cost.kept == heads * cost.kept_pairs(select, 29)


def test_decoding_a_token_costs_its_products_and_the_pairs_it_sees() -> None:
    products = 2 * cost.active_parameters(BASE, embedding=False, mtp=False)
    norms = 3 * (2 * 20 + 12 + 8) + 20
    heads, latent, rope, nope, value = 2, 8, 4, 6, 10
    absorbed = 2 * 3 * heads * (2 * latent + rope) * 11
    assert cost.decode_flops(BASE, 11) == products - 2 * norms + absorbed
    expanded = 2 * 3 * (heads * (nope + rope + value) * 11 + heads * (nope + value) * latent * 10)
    assert cost.decode_flops(BASE, 11, absorbed=False) == products - 2 * norms + expanded


def test_a_dense_model_of_one_layer_computes_what_its_equations_say() -> None:
    """x + Attn(RMS(x)), + SwiGLU(RMS(.)), head of the norm: written out with the module's own attention."""
    config = vary(BASE, num_hidden_layers=1, moe=None, mtp=None)
    model, text = Transformer(config), torch.tensor([[3, 1, 36, 3]])
    weights = dict(model.named_parameters())

    def rms(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weights[name]

    x = weights["embed_tokens.weight"][text]
    block = model.layers[0]
    assert isinstance(block.self_attn, LatentAttention)
    x = x + block.self_attn(rms(x, "layers.0.input_layernorm.weight"))[0]
    normed = rms(x, "layers.0.post_attention_layernorm.weight")
    gate, up, down = (weights[f"layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
    x = x + (F.silu(normed @ gate.T) * (normed @ up.T)) @ down.T
    torch.testing.assert_close(model(text).logits, rms(x, "norm.weight") @ weights["lm_head.weight"].T)
