"""Checkpoints that are whole, sharded, in FP8, or broken in every way that a copy over a network can break them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3.config import MultiHead, Window, vary
from dsv3.model import Transformer, hf
from tests.model.edited import edit_config, edit_tensors
from tests.model.variants import BASE, VARIANTS, latent

# DeepSeek's own config.json of V3, with the widths of BASE: the older dialect, and keys of training.
PUBLISHED = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 20,
    "initializer_range": 0.1,
    "intermediate_size": 28,
    "kv_lora_rank": 8,
    "max_position_embeddings": 64,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 7,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 2,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 10,
    "vocab_size": 37,
}


# The same of V3.2, which adds these.
PUBLISHED_V32 = PUBLISHED | {
    "architectures": ["DeepseekV32ForCausalLM"],
    "index_head_dim": 6,
    "index_n_heads": 3,
    "index_topk": 5,
    "model_type": "deepseek_v32",
}


def changed(**changes: Any) -> str:
    return json.dumps(PUBLISHED | changes)


def changed_v32(**changes: Any) -> str:
    return json.dumps(PUBLISHED_V32 | changes)


def without(name: str) -> str:
    return json.dumps({key: value for key, value in PUBLISHED.items() if key != name})


def test_the_published_dialect_reads_as_the_same_model() -> None:
    assert hf.read_config(json.dumps(PUBLISHED)) == BASE
    assert hf.read_config(json.dumps(PUBLISHED_V32)) == VARIANTS["deepseek_v32"]


def test_published_yarn_reads_as_ours() -> None:
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
    yarn |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    scaling = hf.read_config(changed(rope_scaling=yarn)).rope.scaling
    assert scaling is not None
    assert (scaling.factor, scaling.mscale_all_dim, scaling.beta_slow) == (40, 1.0, 1)


@pytest.mark.parametrize(
    "text, says",
    [
        (changed(sliding_window=128), "sliding_window=128: is not a key that this reader understands"),
        (changed(scoring_func="softmax"), "scoring_func='softmax': must be 'sigmoid'"),
        (changed(topk_method="greedy"), "topk_method='greedy'"),
        (changed(attention_bias=True), "attention_bias=True"),
        (changed(hidden_act="gelu"), "hidden_act='gelu'"),
        (changed(rope_interleave=False), "rope_interleave=False"),
        (changed(model_type="deepseek_v2"), "model_type='deepseek_v2'"),
        (changed(model_type="llama"), "model_type='llama': must be 'deepseek_v3' or 'deepseek_v32'"),
        (changed(index_topk=4), "index_topk=4: is not a key that this reader understands"),
        (changed_v32(index_topk=0), "index_topk=0: must be a whole number"),
        (changed_v32(index_head_dim=2), "index_head_dim=2: must be at least qk_rope_head_dim=4"),
        (changed_v32(q_lora_rank=None), "q_lora_rank=None: must not be None"),
        (changed_v32(layer_types=["full_attention"] * 3), r"layer_types=\['full_attention', .* must be \['indexed_att"),
        (changed_v32(mlp_layer_types=["dense"] * 3), r"must be \['dense', 'sparse', 'sparse'\]"),
        (changed_v32(mlp_bias=True), "mlp_bias=True"),
        (json.dumps(PUBLISHED | {"model_type": "deepseek_v32"}), "index_n_heads: missing"),
        (changed(moe_layer_freq=2), "moe_layer_freq=2"),
        (changed(num_key_value_heads=1), "num_key_value_heads=1: must be 2"),
        (changed(qk_head_dim=9), "qk_head_dim=9: must be 10"),
        (changed(rope_scaling={"type": "linear", "factor": 2}), "rope_type={'linear'}"),
        (
            changed(rope_scaling={"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "x": 1}),
            r"\['x'\]",
        ),
        (changed(rope_scaling={"factor": 2.0}), "has settings of a scaling but no rope_type"),
        (changed(rope_parameters={"rope_type": "default", "rope_theta": 5.0}), "rope_theta=.5.0, 10000."),
        (changed(rope_scaling={"type": "yarn", "factor": 0.5, "original_max_position_embeddings": 8}), "factor=0.5"),
        (changed(dsv3={"ballast": 1}), r"\['ballast'\]"),
        (changed(n_group=3), "n_group=3: must divide"),
        (changed(n_group=None), "n_group=None"),
        (without("kv_lora_rank"), "kv_lora_rank: missing"),
        (without("model_type"), "model_type: missing"),
        (without("rope_theta"), "rope_theta"),
        ("{", "not JSON"),
        ("[1]", "must be an object"),
    ],
)
def test_a_config_that_is_not_understood_is_refused_by_name(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        hf.read_config(text)


@pytest.mark.parametrize(
    "model, says",
    [
        (vary(BASE, attention=MultiHead(num_attention_heads=2, head_dim=6)), "attention='MultiHead'"),
        (vary(BASE, attention=latent(select=Window(size=3))), "select=Window"),
        (vary(VARIANTS["deepseek_v32"], **{"attention.select.stage": "warmup"}), "stage='warmup': readers of such"),
        (vary(BASE, **{"moe.scoring_func": "softmax"}), "scoring_func='softmax'"),
        (vary(BASE, **{"moe.n_shared_experts": 0}), "n_shared_experts=0"),
        (vary(BASE, moe=None), "mtp=MTP"),
    ],
)
def test_a_model_that_the_format_cannot_say_is_not_written(model: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        hf.save(Transformer(model), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["deepseek_v3", "deepseek_v32", "plain_queries", "yarn", "tied", "two_ahead", "nothing_ahead"]
)
@pytest.mark.parametrize("shard_bytes", [1, 4000, 10**9])
def test_saved_and_loaded_the_model_is_the_same_bit_for_bit(name: str, shard_bytes: int, tmp_path: Path) -> None:
    model = Transformer(VARIANTS[name], seed=3)
    for name, buffer in model.named_buffers():
        buffer.normal_(generator=torch.Generator().manual_seed(len(name)))
    hf.save(model, tmp_path, shard_bytes=shard_bytes)
    loaded = hf.load(tmp_path)
    assert loaded.config == model.config
    for (name, before), after in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(before, after), name
    assert not list(tmp_path.glob("*.partial"))


def test_a_checkpoint_that_announces_multi_token_prediction_but_holds_none_loads_without(tmp_path: Path) -> None:
    """transformers writes such: its causal model drops the module and keeps the number in the config."""
    hf.save(Transformer(VARIANTS["nothing_ahead"]), tmp_path)
    edit_config(tmp_path, num_nextn_predict_layers=1)
    assert hf.load(tmp_path).config.mtp is None


@pytest.mark.parametrize(
    "edit, says",
    [
        (lambda t: t.pop("model.norm.weight"), "tensors are missing: model.norm.weight"),
        (lambda t: t.pop("model.layers.3.eh_proj.weight"), "missing: model.layers.3.eh_proj.weight"),
        (lambda t: t.pop("model.layers.1.mlp.gate.e_score_correction_bias"), "e_score_correction_bias"),
        (lambda t: t.update(extra=torch.ones(1)), "no place for: extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight.shape=\(3,\): must be \(20,\)"),
        (lambda t: t["model.layers.3.embed_tokens.weight"].add_(1), "layers.3.embed_tokens.weight.*is a copy"),
        (lambda t: t.update({"model.norm.weight": torch.ones(20, dtype=torch.int32)}), "norm.weight type='I32'"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(edit: Any, says: str, tmp_path: Path) -> None:
    hf.save(Transformer(BASE), tmp_path)
    edit_tensors(tmp_path, edit)
    with pytest.raises(ValueError, match=says):
        hf.load(tmp_path)


def test_copies_of_shared_matrices_may_be_absent(tmp_path: Path) -> None:
    model = Transformer(BASE)
    hf.save(model, tmp_path)
    edit_tensors(tmp_path, lambda t: t.pop("model.layers.3.shared_head.head.weight"))
    assert torch.equal(hf.load(tmp_path).state_dict()["lm_head.weight"], model.state_dict()["lm_head.weight"])


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    hf.save(Transformer(BASE), tmp_path, shard_bytes=4000)
    second = sorted(tmp_path.glob("model-*.safetensors"))[1]
    second.unlink()
    with pytest.raises(ValueError, match=rf"shards that .* names are missing: {second.name}"):
        hf.load(tmp_path)


def test_a_shard_that_is_cut_short_is_named(tmp_path: Path) -> None:
    hf.save(Transformer(BASE), tmp_path, shard_bytes=4000)
    third = sorted(tmp_path.glob("model-*.safetensors"))[2]
    third.write_bytes(third.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{third.name}: cannot be read, cut short"):
        hf.load(tmp_path)


def test_a_shard_without_a_tensor_that_the_index_places_there_is_named(tmp_path: Path) -> None:
    hf.save(Transformer(BASE), tmp_path, shard_bytes=4000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    file = index["weight_map"]["model.norm.weight"]
    tensors = load_file(tmp_path / file)
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / file)
    with pytest.raises(ValueError, match=rf"{file}: tensors that .* places here are missing: model.norm.weight"):
        hf.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    hf.save(Transformer(BASE), tmp_path, shard_bytes=4000)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="not an index of shards"):
        hf.load(tmp_path)


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: cannot be read"):
        hf.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor"):
        hf.load(tmp_path)


def test_a_checkpoint_is_not_written_over_another(tmp_path: Path) -> None:
    hf.save(Transformer(BASE), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"already holds model\.safetensors"):
        hf.save(Transformer(BASE, seed=1), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made"):
        hf.save(Transformer(BASE), tmp_path / "file")
