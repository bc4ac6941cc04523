"""Arithmetic, trace and allocator say the same of one step."""

from typing import Any

import pytest
import torch

from bench.budget.activations import POLICIES, Batch, Policy, kept_bytes, recomputed_flops
from bench.budget.agreement import real, traced, without_selection
from bench.budget.allocator import allocated
from bench.budget.asked import Asked, figures
from bench.budget.states import RECIPES, recipe
from bench.budget.traced import build, trace
from bench.meters.saved import saved_bytes
from dsv3.config import (
    MTP,
    Config,
    Dropless,
    Fixed,
    Grouped,
    Latent,
    MultiHead,
    PerHead,
    QuadraticLoss,
    SwitchLoss,
    presets,
    vary,
)
from dsv3.model import cost

SCALARS = 64  # bytes: the loss, its parts and its weight, which the arithmetic leaves out


def tiny(**changes: Any) -> Config:
    """Its dense layer, one of experts and its MTP module."""
    return vary(presets.tiny(), **{"model.num_hidden_layers": 2, "train.sequence_length": 63, **changes})


def latent(**changes: Any) -> Latent:
    return vary(presets.tiny().model.attention, **changes)


CONFIGS = {
    "tiny": tiny(),
    "multi_head": tiny(**{"model.attention": MultiHead(num_attention_heads=4, head_dim=32)}),
    "grouped": tiny(**{"model.attention": Grouped(num_attention_heads=4, num_key_value_heads=2, head_dim=32)}),
    "queries_without_latent": tiny(**{"model.attention": latent(q_lora_rank=None)}),
    "values_as_wide_as_keys": tiny(**{"model.attention": latent(v_head_dim=48)}),
    "values_wider_than_keys": tiny(**{"model.attention": latent(v_head_dim=64)}),
    "no_multi_token_prediction": tiny(**{"model.mtp": None}),
    "two_depths": tiny(**{"model.mtp": MTP(num_nextn_predict_layers=2)}),
    "pre_norm": tiny(**{"model.mtp": MTP(hidden="pre_norm")}),
    "tied": tiny(**{"model.tie_word_embeddings": True}),
    "dense": tiny(**{"model.moe": None}),
    "no_shared_expert": tiny(**{"model.moe.n_shared_experts": 0}),
    "softmax_router": tiny(**{"model.moe.scoring_func": "softmax", "model.moe.norm_topk_prob": False}),
    "other_losses": tiny(**{"model.moe.balance": (SwitchLoss(), QuadraticLoss())}),
    "capacity": tiny(**{"model.moe.capacity": Fixed(factor=1.2)}),
    "small": vary(presets.small(), **{"train.sequence_length": 100}),
    "article": vary(presets.article(), **{"model.num_hidden_layers": 2, "train.sequence_length": 512}),
    "deepseek_v2_lite": vary(presets.deepseek_v2_lite(), **{"model.num_hidden_layers": 3}),
    "deepseek_v3": vary(presets.deepseek_v3(), **{"model.num_hidden_layers": 4}),
}


def agree(asked: Asked) -> None:
    said, found = figures(asked), traced(asked)
    assert abs(found["saved_bytes"] - said["saved_bytes"]) <= SCALARS
    exact = [name for name in said if name not in ("saved_bytes", "live_bytes")]
    assert {name: found[name] for name in exact} == {name: said[name] for name in exact}
    assert said["live_bytes"] == pytest.approx(found["live_bytes"], rel=0.1)


@pytest.mark.parametrize("name", CONFIGS)
def test_arithmetic_and_trace_agree_for_every_kind_of_model(name: str) -> None:
    asked = Asked(name=name, config=CONFIGS[name], recipe=recipe("bfloat16"), sequences=2)
    agree(without_selection(asked))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", [row.name for row in RECIPES])
def test_arithmetic_and_trace_agree_for_every_recipe_and_policy(name: str, policy: Policy) -> None:
    agree(Asked(name="tiny", config=tiny(), recipe=recipe(name), policy=policy))


@pytest.mark.slow
def test_all_layers_of_deepseek_v3_are_traced_and_agree() -> None:
    agree(Asked(name="deepseek_v3", config=presets.deepseek_v3(), recipe=recipe("bfloat16")))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_the_traced_peak_is_the_allocators(name: str, policy: Policy) -> None:
    asked = Asked(name="tiny", config=tiny(), recipe=recipe(name), policy=policy, sequences=2)
    found, scratch = real(asked)
    assert traced(asked)["live_bytes"] == pytest.approx(found["live_bytes"], rel=0.05)
    assert any("attention" in operator for operator in scratch), "the fused attention takes memory inside itself"


def test_the_peak_of_a_first_microbatch_is_the_allocators_too() -> None:
    config = vary(presets.small(), **{"train.sequence_length": 60})
    there = allocated(config, recipe("bfloat16")).peak
    assert trace(config, recipe("bfloat16")).peak == pytest.approx(there, rel=0.05)


@pytest.mark.parametrize("select", [PerHead(keep=0.3), PerHead(k=40)], ids=["share", "number"])
@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_what_a_selection_keeps_is_as_measured_on_real_tensors(name: str, select: PerHead) -> None:
    config = vary(presets.article_small(), **{"model.attention.select": select, "train.sequence_length": 300})
    config = vary(config, **{"model.moe.capacity": Dropless()})
    step = build(config, recipe(name), sequences=2, policy="none")
    batch = Batch(sequences=2, length=300, element=recipe(name).weight)
    measured = saved_bytes(step.loss, step.model.parameters()).value
    assert abs(measured - kept_bytes(config.model, batch)) <= SCALARS


def test_a_selection_of_keys_is_refused_with_what_to_trace_instead() -> None:
    with pytest.raises(ValueError, match=r"sizes of its lists are data.*Everything"):
        trace(presets.article_small(), recipe("bfloat16"))


def test_replicas_hand_over_every_gradient_once_and_pay_for_a_flat_buffer() -> None:
    config = tiny(**{"train.sequence_length": 16})
    alone, one_of = (trace(config, recipe("deepseek"), replicas=world) for world in (1, 8))
    assert (alone.handed, one_of.handed) == (0, 4 * cost.parameters(config.model))
    assert one_of.peak - alone.peak >= one_of.handed
    assert not torch.distributed.is_initialized()


def test_the_kinds_at_the_peak_add_up_to_it() -> None:
    found = trace(tiny(), recipe("mixed"), policy="full")
    assert sum(found.at_peak.values()) == found.peak


def test_backward_runs_nothing_again_without_a_policy() -> None:
    batch = Batch(sequences=1, length=8, element=2)
    again = [recomputed_flops(presets.tiny().model, batch, policy) for policy in POLICIES]
    assert again[0] == 0 < again[1] < again[2] < cost.flops_per_token(presets.tiny().model, 8) * 8
