"""Checkpoints in FP8: codes and scales read as the weights they stand for, written back, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dsv3.config import MTP, vary
from dsv3.model import Transformer, hf
from tests.model.edited import edit_config, edit_tensors
from tests.model.variants import BASE

WIDE = vary(
    BASE,
    hidden_size=130,
    intermediate_size=260,
    mtp=MTP(num_nextn_predict_layers=1),
    **{"moe.moe_intermediate_size": 129, "moe.n_routed_experts": 4, "moe.n_group": 2, "moe.num_experts_per_tok": 2},
)
CODED = ("_proj.weight", "eh_proj.weight")


def write_float8(directory: Path, scale_fmt: str) -> dict[str, torch.Tensor]:
    """A checkpoint whose linear layers are FP8 codes; returns the weights that they stand for, block by block."""
    hf.save(Transformer(WIDE, seed=5).to(torch.bfloat16), directory)
    meant: dict[str, torch.Tensor] = {}

    def to_codes(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(CODED)]:
            weight = tensors[name].float()
            blocks = (-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))
            scale, codes = torch.empty(blocks), torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
            meant[name] = torch.empty(weight.shape, dtype=torch.bfloat16)
            for i in range(blocks[0]):
                for j in range(blocks[1]):
                    at = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
                    s = weight[at].abs().max() / 448 * (1.7 if name.endswith("down_proj.weight") else 1.0)
                    s = 2.0 ** s.log2().ceil() if scale_fmt == "ue8m0" else s
                    codes[at], scale[i, j] = (weight[at] / s).to(torch.float8_e4m3fn), s
                    meant[name][at] = (codes[at].float() * s).to(torch.bfloat16)
            tensors[name], tensors[f"{name}_scale_inv"] = codes, scale

    edit_tensors(directory, to_codes)
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    edit_config(directory, quantization_config=quantization | ({"scale_fmt": "ue8m0"} if scale_fmt == "ue8m0" else {}))
    return meant


@pytest.mark.parametrize("scale_fmt", ["fp32", "ue8m0"])
def test_fp8_weights_are_their_bf16_dequantisation(scale_fmt: str, tmp_path: Path) -> None:
    meant = write_float8(tmp_path, scale_fmt)
    checkpoint = hf.read(tmp_path)
    assert checkpoint.float8 is not None
    assert checkpoint.float8.scale_fmt == scale_fmt
    assert {p.dtype for p in checkpoint.model.parameters()} == {torch.bfloat16}
    ours = checkpoint.model.state_dict()
    seen = {e.stored: e.view(ours[e.ours]) for e in hf.entries(WIDE) if e.stored in meant}
    assert seen.keys() == meant.keys()
    for name, weight in meant.items():
        assert torch.equal(seen[name], weight), name


@pytest.mark.parametrize("scale_fmt", ["fp32", "ue8m0"])
def test_fp8_codes_and_scale_format_survive_reading_and_writing(scale_fmt: str, tmp_path: Path) -> None:
    write_float8(tmp_path / "before", scale_fmt)
    checkpoint = hf.read(tmp_path / "before")
    hf.save(checkpoint.model, tmp_path / "after", float8=checkpoint.float8)
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("before", "after"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    config = json.loads((tmp_path / "after" / "config.json").read_text())
    assert config["quantization_config"].get("scale_fmt", "fp32") == scale_fmt


def test_an_fp8_weight_that_changed_is_quantised_anew(tmp_path: Path) -> None:
    write_float8(tmp_path / "before", "ue8m0")
    checkpoint = hf.read(tmp_path / "before")
    with torch.no_grad():
        checkpoint.model.layers[0].mlp.up_proj.weight.mul_(-3)
    hf.save(checkpoint.model, tmp_path / "after", float8=checkpoint.float8)
    weight = checkpoint.model.layers[0].mlp.up_proj.weight
    again = hf.load(tmp_path / "after").layers[0].mlp.up_proj.weight
    # e4m3 keeps 4 bits: 2^-4 of the number, or of the block's smallest normal 2^-6 x scale
    assert ((again - weight).abs() <= weight.abs() * 2**-4 + weight.abs().max() / 224 * 2**-10).all()
    scale = load_file(tmp_path / "after" / "model.safetensors")["model.layers.0.mlp.up_proj.weight_scale_inv"]
    assert torch.equal(scale.log2(), scale.log2().round())


@pytest.mark.parametrize(
    "change, says",
    [
        ({"fmt": "e5m2"}, "fmt='e5m2'"),
        ({"weight_block_size": [64, 64]}, r"weight_block_size=\[64, 64\]"),
        ({"scale_fmt": "fp16"}, "scale_fmt='fp16'"),
        ({"rotate": True}, "rotate=True: is not a key"),
    ],
)
def test_a_quantisation_that_is_not_understood_is_refused_by_name(change: Any, says: str, tmp_path: Path) -> None:
    write_float8(tmp_path, "fp32")
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    edit_config(tmp_path, quantization_config=quantization | change)
    with pytest.raises(ValueError, match=says):
        hf.load(tmp_path)


def test_fp8_codes_without_scales_or_config_are_refused(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    write_float8(tmp_path, "fp32")
    edit_config(tmp_path, quantization_config=None)
    with pytest.raises(ValueError, match="quantization_config: missing"):
        hf.load(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({f"{name}_scale_inv": torch.ones(1, 1)}))
    edit_config(tmp_path, quantization_config={})
    with pytest.raises(ValueError, match=r"o_proj.weight_scale_inv.shape=\(1, 1\): must be \(2, 1\)"):
        hf.load(tmp_path)
    edit_tensors(tmp_path, lambda t: t.pop(f"{name}_scale_inv"))
    with pytest.raises(ValueError, match=f"tensors are missing: {name}_scale_inv"):
        hf.load(tmp_path)
