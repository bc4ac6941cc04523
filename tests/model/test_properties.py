"""What holds for every valid model, drawn at random."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.config import Everything, Indexer, Latent, Model, vary
from dsv3.model import Transformer, cost
from dsv3.model.choosing import decoding_flops, selection_flops
from dsv3.model.hf import entries, read_config, write_config
from tests.config.strategies import latent, models


def writable(model: Model, attention: Latent) -> Model:
    """The nearest model that a checkpoint can describe."""
    select = vary(attention.select, stage="sparse") if isinstance(attention.select, Indexer) else Everything()
    model = replace(model, attention=replace(attention, select=select))
    if model.moe is None:
        return replace(model, mtp=None, first_k_dense_replace=model.num_hidden_layers)
    shared = max(model.moe.n_shared_experts, 1)
    return vary(model, **{"moe.scoring_func": "sigmoid", "moe.n_shared_experts": shared})


checkpoints = st.builds(writable, models(), latent)


@given(models())
@settings(max_examples=40)
def test_the_analytic_table_is_the_meta_model(config: Model) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == cost.parameter_shapes(config)
    assert cost.parameters(config) == sum(p.numel() for p in model.parameters())


@given(models())
def test_active_parameters_leave_out_the_experts_that_a_token_skips(config: Model) -> None:
    total, active = cost.parameters(config), cost.active_parameters(config)
    if config.moe is None:
        assert active == total
        return
    idle = config.moe.n_routed_experts - config.moe.num_experts_per_tok
    layers = config.num_hidden_layers - config.first_k_dense_replace + cost.mtp_depths(config)
    assert active == total - layers * idle * 3 * config.hidden_size * config.moe.moe_intermediate_size


@given(models(), st.integers(4, 40))
def test_flops_grow_with_length_and_training_is_threefold_but_for_choosing(config: Model, length: int) -> None:
    flops, longer = (cost.forward_flops(config, at) for at in (length, length + 1))
    assert all(longer[name] >= value for name, value in flops.items())
    forward = sum(flops.values())
    chosen = sum(value for name, value in flops.items() if name.endswith(".selection.scores"))
    assert cost.flops_per_token(config, length) == forward / length
    training = cost.flops_per_token(config, length, training=True)
    if isinstance(config.attention.select, Indexer):
        return  # see test_training_an_indexer_pays_for_no_gradient_of_its_inputs
    assert training == pytest.approx((3 * forward - 2 * chosen) / length)


@given(models(), st.integers(2, 40))
def test_decoding_token_by_token_costs_one_forward_pass(config: Model, length: int) -> None:
    """Expanded, so that only the latents of earlier tokens going through kv_b_proj again are more than a forward."""
    searched = sum(decoding_flops(config.attention, visible) for visible in range(1, length + 1))
    assert searched == selection_flops(config.attention, length)
    again = 0
    if isinstance(config.attention, Latent):
        a = config.attention
        kv_b = a.num_attention_heads * (a.qk_nope_head_dim + a.v_head_dim) * a.kv_lora_rank
        again += 2 * config.num_hidden_layers * kv_b * length * (length - 1) // 2
    tokens = sum(cost.decode_flops(config, visible, absorbed=False) for visible in range(1, length + 1))
    assert tokens - again == sum(cost.forward_flops(config, length, mtp=False).values())


@given(checkpoints)
def test_config_json_says_the_whole_model(config: Model) -> None:
    assert read_config(json.dumps(write_config(config))) == config


@given(checkpoints)
@settings(max_examples=40)
def test_stored_tensors_cover_every_parameter_once(config: Model) -> None:
    with torch.device("meta"):
        ours = Transformer(config).state_dict()
    originals = [entry for entry in entries(config) if not entry.copy]
    covered = dict.fromkeys(ours, 0)
    for entry in originals:
        covered[entry.ours] += entry.view(ours[entry.ours]).numel()
    assert covered == {name: tensor.numel() for name, tensor in ours.items()}
    assert len({entry.stored for entry in entries(config)}) == len(list(entries(config)))
