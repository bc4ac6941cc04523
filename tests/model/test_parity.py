"""Against transformers' DeepSeek-V3 and V3.2, in both directions: they write and we read, we write and they read.

V3.2 selects 16 keys of up to 63, with 32 index heads: few heads leave many scores at exactly 0, of which transformers
takes any. Its indexer learns nothing, so it has no gradients to compare.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import DeepseekV3ForCausalLM, DeepseekV32ForCausalLM, PreTrainedModel
from transformers.modeling_layers import MtpModel
from transformers.utils import logging

from dsv3.attention import KeyValueCache
from dsv3.config import MTP, Everything, Indexer, Latent, vary
from dsv3.model import Transformer, hf

logging.disable_progress_bar()

TINY = {
    "vocab_size": 131,
    "hidden_size": 96,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "kv_lora_rank": 24,
    "q_lora_rank": 40,
    "qk_rope_head_dim": 64,
    "v_head_dim": 24,
    "qk_nope_head_dim": 16,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
INDEXER = {"index_n_heads": 32, "index_head_dim": 72, "index_topk": 16}
CONFIGS = {
    "v3_in_small": {},
    "plain_queries": {"q_lora_rank": None, "n_shared_experts": 2},
    "yarn": {"rope_parameters": YARN},
    "yarn_without_softmax_scale": {"rope_parameters": YARN | {"mscale": 0.0, "mscale_all_dim": 0.0}},
    "yarn_magnitudes_that_differ": {"rope_parameters": YARN | {"mscale": 0.707, "beta_fast": 4.0}, "q_lora_rank": None},
    "one_group": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "all_groups_of_two": {"topk_group": 4, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "tied": {"tie_word_embeddings": True, "first_k_dense_replace": 0},
    "v32_in_small": INDEXER,
    "v32_yarn": INDEXER | {"rope_parameters": YARN, "n_shared_experts": 2},
    "v32_tied_and_all_rotated": INDEXER | {"tie_word_embeddings": True, "index_head_dim": 64, "index_topk": 3},
    "two_dense_and_wide_values": {"first_k_dense_replace": 2, "v_head_dim": 104, "rms_norm_eps": 1e-3},
}

every_config = pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())


def their_class(changes: dict[str, object]) -> type[DeepseekV3ForCausalLM] | type[DeepseekV32ForCausalLM]:
    return DeepseekV32ForCausalLM if "index_topk" in changes else DeepseekV3ForCausalLM


def oracle(changes: dict[str, object]) -> PreTrainedModel:
    """Their model with norm weights away from 1, biases away from 0, and weights wide enough that scores differ."""
    model = their_class(changes)(their_class(changes).config_class(**TINY | changes)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "inv_freq" not in name:
                around = 1.0 if "norm" in name else 0.0
                tensor.copy_(around + 0.15 * torch.randn(tensor.shape, generator=generator))
    return model


def text(batch: int = 2, length: int = 63) -> Tensor:
    return torch.randint(131, (batch, length), generator=torch.Generator().manual_seed(1))


def by_stored_name(ours: Transformer, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {e.stored: e.view(tensors[e.ours]) for e in hf.entries(ours.config) if not e.copy and e.ours in tensors}


def stored_gradients(theirs: PreTrainedModel) -> dict[str, Tensor]:
    """Their gradients under the names of a checkpoint, experts apart."""
    gradients = {}
    for name, parameter in theirs.named_parameters():
        if ".indexer." in name:
            continue
        assert parameter.grad is not None, name
        if name.endswith("gate_up_proj"):
            for expert, both in enumerate(parameter.grad):
                for part, half in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True):
                    gradients[name.replace("gate_up_proj", f"{expert}.{part}.weight")] = half
        elif name.endswith("experts.down_proj"):
            for expert, grad in enumerate(parameter.grad):
                gradients[name.replace("down_proj", f"{expert}.down_proj.weight")] = grad
        else:
            gradients[name] = parameter.grad
    return gradients


@every_config
def test_logits_and_gradients_of_what_they_wrote(changes: dict[str, object], tmp_path: Path) -> None:
    theirs = oracle(changes)
    theirs.save_pretrained(tmp_path)
    ours = hf.load(tmp_path).eval()
    tokens = text()
    expected, given = theirs(tokens).logits, ours(tokens).logits
    assert (given - expected).abs().max() <= 2e-5 * expected.abs().max()
    F.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    F.cross_entropy(given[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    grads = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    mine, other = by_stored_name(ours, grads), stored_gradients(theirs)
    assert mine.keys() == other.keys()
    for name, gradient in other.items():
        assert (mine[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-12, name


@every_config
def test_logits_of_what_we_wrote(changes: dict[str, object], tmp_path: Path) -> None:
    theirs = oracle(changes)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = hf.load(tmp_path / "theirs").eval()
    hf.save(ours, tmp_path / "ours", shard_bytes=100_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    again = their_class(changes).from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(again(text()).logits, theirs(text()).logits)
    assert hf.load(tmp_path / "ours").config == ours.config


@pytest.mark.parametrize("changes", [{}, INDEXER], ids=["v3", "v32"])
def test_round_trip_is_equal_bit_for_bit(changes: dict[str, object], tmp_path: Path) -> None:
    oracle(changes).save_pretrained(tmp_path / "theirs")
    hf.save(hf.load(tmp_path / "theirs"), tmp_path / "ours")
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name


def test_the_indexer_of_v32_decides_what_is_seen(tmp_path: Path) -> None:
    """So that equal logits say something of it: seeing everything, they would be others."""
    oracle(INDEXER).save_pretrained(tmp_path)
    ours = hf.load(tmp_path).eval()
    assert isinstance(ours.config.attention, Latent)
    assert ours.config.attention.select == Indexer(**INDEXER)
    dense = Transformer(vary(ours.config, **{"attention.select": Everything()})).eval()
    dense.load_state_dict({name: weight for name, weight in ours.state_dict().items() if ".indexer." not in name})
    sparse, full = ours(text()).logits, dense(text()).logits
    torch.testing.assert_close(sparse[:, :16], full[:, :16])
    assert (sparse[:, 16:] - full[:, 16:]).abs().max() > 0.1 * full.abs().max()


def test_decoding_with_a_cache_reads_like_theirs(tmp_path: Path) -> None:
    theirs = oracle(INDEXER)
    theirs.save_pretrained(tmp_path)
    ours, tokens = hf.load(tmp_path).eval(), text(length=40)
    cache, held = KeyValueCache.empty(ours.config, 2, 40), None
    with torch.no_grad():
        for part in tokens.split([30, *[1] * 10], dim=1):
            output, expected = ours(part, cache=cache), theirs(part, cache=held, use_cache=True)
            cache, held = output.cache, expected.cache
            assert (output.logits - expected.logits).abs().max() <= 2e-5 * expected.logits.abs().max()


def test_bf16_checkpoints_stay_bf16_and_their_bias_fp32(tmp_path: Path) -> None:
    theirs = oracle({}).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = hf.load(tmp_path / "theirs")
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in ours.buffers()} == {torch.float32}
    hf.save(ours, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "bfloat16"
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert all(torch.equal(tensor.float(), after[name].float()) for name, tensor in before.items())


def test_multi_token_prediction_reads_like_theirs(tmp_path: Path) -> None:
    """Depth 2, every position, their layers fed with our checkpoint; hidden states after the norm, as they do."""
    theirs = oracle({"num_mtp_layers": 2})
    theirs.save_pretrained(tmp_path / "theirs")
    base = hf.load(tmp_path / "theirs")
    ours = Transformer(replace(base.config, mtp=MTP(num_nextn_predict_layers=2), initializer_range=0.15))
    ours.load_state_dict(base.state_dict(), strict=False)
    hf.save(ours, tmp_path / "ours")
    further = MtpModel(theirs, 2).eval()
    _load_mtp(further, tmp_path / "ours", layers=3)
    tokens = text(length=20)
    hidden = theirs.model(tokens).last_hidden_state
    output = ours.eval()(tokens)
    for m, given in enumerate(output.mtp_logits, start=1):
        positions = torch.arange(20 - m)[None]
        hidden = further.forward_layer(m - 1, hidden[:, : 20 - m], positions, None, input_ids=tokens[:, m:])
        expected = theirs.lm_head(hidden)
        assert (given - expected).abs().max() <= 2e-5 * expected.abs().max()


def _load_mtp(further: MtpModel, directory: Path, *, layers: int) -> None:
    stored = load_file(directory / "model.safetensors")
    for depth, layer in enumerate(further.layers):
        prefix = f"model.layers.{layers + depth}."
        here = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
        assert torch.equal(here.pop("embed_tokens.weight"), stored["model.embed_tokens.weight"])
        assert torch.equal(here.pop("shared_head.head.weight"), stored["lm_head.weight"])
        renamed = {"post_norm.weight": here.pop("shared_head.norm.weight")}
        renamed |= {f"{name}.weight": here.pop(f"{name}.weight") for name in ("enorm", "hnorm", "eh_proj")}
        experts = range(further.config.n_routed_experts)

        def stack(part: str, here: dict[str, Tensor] = here, experts: range = experts) -> Tensor:
            return torch.stack([here.pop(f"mlp.experts.{expert}.{part}_proj.weight") for expert in experts])

        gate, up, down = stack("gate"), stack("up"), stack("down")
        renamed["mtp_block.mlp.experts.gate_up_proj"] = torch.cat((gate, up), dim=1)
        renamed["mtp_block.mlp.experts.down_proj"] = down
        renamed |= {f"mtp_block.{name}": value for name, value in here.items()}
        layer.load_state_dict(renamed)
