"""Arithmetic, trace and allocator say the same of one step."""

import gc
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from bench.budget.activations import POLICIES, Batch, Policy, kept_bytes, recomputed_flops
from bench.budget.agreement import real, traced, without_selection
from bench.budget.allocator import allocated
from bench.budget.asked import Asked, figures, replica_figures
from bench.budget.counted import attention_formulas
from bench.budget.live import Live
from bench.budget.splits import Split
from bench.budget.states import RECIPES, recipe
from bench.budget.traced import build, trace
from dsv3.config import (
    MTP,
    Adaptive,
    Auto,
    Blocks,
    Config,
    Dropless,
    ExpertChoice,
    Fixed,
    Grouped,
    Hierarchical,
    Indexer,
    Latent,
    MultiHead,
    PerHead,
    QuadraticLoss,
    SimilarityLoss,
    SwitchLoss,
    Window,
    ZLoss,
    presets,
    vary,
)
from dsv3.model import cost
from dsv3.model.cost import attention_flops

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
    "z_loss": tiny(**{"model.moe.balance": (ZLoss(),)}),
    "capacity": tiny(**{"model.moe.capacity": Fixed(factor=1.2)}),
    "adaptive_capacity": tiny(**{"model.moe.capacity": Adaptive()}),
    "small": vary(presets.small(), **{"train.sequence_length": 100}),
    "article": vary(presets.article(), **{"model.num_hidden_layers": 2, "train.sequence_length": 512}),
    "deepseek_v2_lite": vary(presets.deepseek_v2_lite(), **{"model.num_hidden_layers": 3}),
    "deepseek_v3": vary(presets.deepseek_v3(), **{"model.num_hidden_layers": 4}),
}
LONG: dict[str, Any] = {"model.vocab_size": 64, "train.sequence_length": 255}
PEAKS = {  # where the peak is in another moment than that of the losses
    "experts": tiny(**LONG),
    "no_shared_expert": vary(CONFIGS["no_shared_expert"], **LONG),
    "dense": vary(CONFIGS["dense"], **LONG),
    "wide": vary(CONFIGS["dense"], **LONG, **{"model.intermediate_size": 1024}),
    "no_multi_token_prediction": vary(CONFIGS["no_multi_token_prediction"], **LONG),
    "short": tiny(**LONG | {"train.sequence_length": 15}),
    "short_and_tied": vary(CONFIGS["tied"], **{"model.mtp": None}),
    "two_depths": vary(CONFIGS["two_depths"], **{"train.sequence_length": 255}),
}


def agree(asked: Asked) -> None:
    said, found = figures(asked), traced(asked).device
    assert abs(found["saved_bytes"] - said["saved_bytes"]) <= SCALARS
    exact = [name for name in said if name not in ("saved_bytes", "live_bytes")]
    assert {name: found[name] for name in exact} == {name: said[name] for name in exact}
    assert beyond_states(said, said) == pytest.approx(beyond_states(found, said), rel=0.05)


def beyond_states(found: Mapping[str, int], said: Mapping[str, int]) -> int:
    """The peak without states, whose bytes are exact and would hide an error in the rest."""
    return found["live_bytes"] - sum(said[name] for name in ("parameter_bytes", "gradient_bytes", "optimizer_bytes"))


@pytest.mark.parametrize("name", CONFIGS)
def test_arithmetic_and_trace_agree_for_every_kind_of_model(name: str) -> None:
    asked = Asked(name=name, config=CONFIGS[name], recipe=recipe("bfloat16"), sequences=2)
    agree(without_selection(asked))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", [row.name for row in RECIPES])
def test_arithmetic_and_trace_agree_for_every_recipe_and_policy(name: str, policy: Policy) -> None:
    agree(Asked(name="tiny", config=tiny(), recipe=recipe(name), policy=policy))


@pytest.mark.parametrize("name, policy", [*(("bfloat16", policy) for policy in POLICIES), ("float32", "none")])
@pytest.mark.parametrize("model", PEAKS)
def test_arithmetic_finds_the_peak_wherever_it_is(model: str, name: str, policy: Policy) -> None:
    agree(Asked(name=model, config=PEAKS[model], recipe=recipe(name), policy=policy))


@pytest.mark.parametrize("name, policy", [*(("bfloat16", policy) for policy in POLICIES), ("float32", "none")])
def test_similarity_loss_keeps_what_is_said_and_multiplies_what_no_token_asks_for(name: str, policy: Policy) -> None:
    config = tiny(**{"model.moe.balance": (SimilarityLoss(),)})
    assert config.model.moe is not None
    asked = Asked(name="similarity", config=config, recipe=recipe(name), policy=policy)
    said, found = figures(asked), traced(asked).device
    assert abs(found["saved_bytes"] - said["saved_bytes"]) <= SCALARS
    # W W^T and its gradient of the layer and of the MTP module's: the price list is of products with tokens
    experts, layers = config.model.moe.n_routed_experts, 2
    assert found["flops"] - said["flops"] == layers * 6 * experts**2 * config.model.hidden_size


def test_a_budget_of_experts_that_choose_is_refused() -> None:
    config = tiny(**{"model.moe.balance": (ExpertChoice(),), "model.moe.n_group": 1, "model.moe.topk_group": 1})
    with pytest.raises(ValueError, match=r"balance=ExpertChoice\(\): the budget counts experts that tokens choose"):
        figures(Asked(name="expert_choice", config=config, recipe=recipe("bfloat16")))


def test_a_budget_of_tokens_that_are_sent_on_is_refused() -> None:
    config = tiny(**{"model.moe.capacity": Fixed(factor=1.2, policy="reroute")})
    with pytest.raises(ValueError, match=r"policy='reroute'\): the budget counts tokens that are dropped"):
        figures(Asked(name="reroute", config=config, recipe=recipe("bfloat16")))


@pytest.mark.slow
def test_all_layers_of_deepseek_v3_are_traced_and_agree() -> None:
    agree(Asked(name="deepseek_v3", config=presets.deepseek_v3(), recipe=recipe("bfloat16")))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", [row.name for row in RECIPES])
def test_the_peak_by_arithmetic_and_trace_is_the_allocators(name: str, policy: Policy) -> None:
    config = tiny(**{"model.num_hidden_layers": 1})
    asked = Asked(name="tiny", config=config, recipe=recipe(name), policy=policy, sequences=2)
    there, scratch = real(asked)
    said, found = figures(asked), traced(asked).device
    assert beyond_states(found, said) == pytest.approx(beyond_states(there, said), rel=0.01)
    assert beyond_states(said, said) == pytest.approx(beyond_states(there, said), rel=0.05)
    assert any("attention" in operator for operator in scratch), "the fused attention takes memory inside itself"


def test_the_peak_of_a_first_microbatch_is_the_allocators_too() -> None:
    config = vary(presets.small(), **{"train.sequence_length": 60})
    there = allocated(config, recipe("bfloat16")).peak
    assert trace(config, recipe("bfloat16")).peak == pytest.approx(there, rel=0.05)


SELECTS = {
    "a_share_per_head": PerHead(keep=0.3),
    "a_number_per_head": PerHead(k=40),
    "window": Window(size=70, sink=10),
    "blocks": Blocks(k=4, block_q=16, block_k=16),
    "blocks_of_a_group": Blocks(keep=0.4, block_q=32, block_k=16, sharing="group"),
    "blocks_of_all_heads": Blocks(k=6, top_p=0.5, block_q=16, block_k=32, sharing="all"),
    "a_choice_per_token": Blocks(k=5, block_q=1, block_k=8),
    "hierarchical": Hierarchical(k=5, top_p=0.9, block_q=16, block_k=16),
    "auto": Auto(k=4, block_q=16, block_k=16, crossover=160),
}
WHERE = [
    *(("multi_head", "bfloat16", select) for select in SELECTS),
    *(("multi_head", "float32", select) for select in ("a_share_per_head", "window", "blocks")),
    *(
        (attention, "bfloat16", select)
        for attention in ("grouped", "tiny")
        for select in ("window", "blocks_of_a_group")
    ),
]


@pytest.mark.parametrize("attention, name, select", WHERE)
def test_what_a_selection_keeps_is_as_measured_on_real_tensors(attention: str, name: str, select: str) -> None:
    whole = {"train.sequence_length": 270, "model.attention": CONFIGS[attention].model.attention}
    config = vary(presets.article_small(), **whole, **{"model.num_hidden_layers": 2, "model.moe.capacity": Dropless()})
    config = vary(config, **{"model.attention.select": SELECTS[select]})
    assert kept_now(config, name) == pytest.approx(kept_said(config, name), abs=SCALARS)


@pytest.mark.parametrize("topk", [10, 100], ids=["few_keys", "all_keys"])
@pytest.mark.parametrize("loss_weight", [0.0, 1.0], ids=["fixed", "learns"])
@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_what_an_indexer_keeps_is_as_measured_on_real_tensors(name: str, loss_weight: float, topk: int) -> None:
    indexer = Indexer(index_n_heads=3, index_head_dim=32, index_topk=topk, loss_weight=loss_weight)
    config = tiny(**{"model.attention.select": indexer})
    assert kept_now(config, name) == pytest.approx(kept_said(config, name), abs=SCALARS)


def test_an_indexer_that_warms_up_is_refused() -> None:
    indexer = Indexer(index_n_heads=3, index_head_dim=32, index_topk=10, stage="warmup")
    with pytest.raises(ValueError, match=r"stage='warmup': must be 'sparse'.*not priced"):
        Asked(name="tiny", config=tiny(**{"model.attention.select": indexer}), recipe=recipe("bfloat16"))


def test_a_choice_that_learns_is_refused() -> None:
    select = Blocks(k=4, block_q=16, block_k=16, learns="gated")
    with pytest.raises(ValueError, match=r"learns='gated': must be 'nothing'.*not priced"):
        Asked(
            name="grouped",
            config=vary(CONFIGS["grouped"], **{"model.attention.select": select}),
            recipe=recipe("bfloat16"),
        )


def kept_said(config: Config, name: str) -> int:
    length = config.train.sequence_length
    return kept_bytes(config.model, Batch(sequences=2, length=length, element=recipe(name).weight))


def kept_now(config: Config, name: str) -> int:
    """Bytes that two real sequences leave behind after forward; what a loss differentiates inside itself is gone."""
    step = build(config, recipe(name), sequences=2, policy="none")
    with Live() as live:
        live.own(step.model.parameters(), "parameters")
        before = live.now
        loss = step.loss()
        gc.collect()
        assert loss.requires_grad
        return live.now - before


def test_a_selection_of_keys_is_refused_with_what_to_trace_instead() -> None:
    with pytest.raises(ValueError, match=r"sizes of its lists are data.*Everything"):
        trace(presets.article_small(), recipe("bfloat16"))


@pytest.mark.parametrize("name", [row.name for row in RECIPES])
def test_replicas_hand_over_every_gradient_once_and_pay_for_two_flat_buffers(name: str) -> None:
    asked = Asked(name="tiny", config=tiny(), recipe=recipe(name), split=Split(dp=8))
    alone, first = (trace(asked.config, asked.recipe, replicas=replicas) for replicas in (1, 8))
    assert first.handed == recipe(name).gradient * cost.parameters(asked.config.model)
    assert replace(first, handed=0, replica_peak=first.peak) == alone
    said, found = replica_figures(asked), traced(asked).replica
    assert said["sent_bytes"] == found["sent_bytes"] == 2 * first.handed * 7 // 8
    assert said["live_bytes"] == pytest.approx(found["live_bytes"], rel=0.05)
    assert not torch.distributed.is_initialized()


def test_the_kinds_at_the_peak_add_up_to_it() -> None:
    found = traced(Asked(name="tiny", config=tiny(), recipe=recipe("mixed"), policy="full"))
    assert sum(found.at_peak.values()) == found.device["live_bytes"]


@pytest.mark.parametrize("name", ["multi_head", "tiny"])
def test_torchs_own_count_of_masked_attention_is_twice_the_models_within_the_diagonal(name: str) -> None:
    model = CONFIGS[name].model
    wide = model.attention.qk_head_dim if isinstance(model.attention, Latent) else model.attention.head_dim
    narrow = model.attention.v_head_dim if isinstance(model.attention, Latent) else wide
    batch, heads, length = 2, 4, 24
    q, k, v = (torch.ones(batch, heads, length, width, requires_grad=True) for width in (wide, wide, narrow))
    with FlopCounterMode(display=False) as dense, sdpa_kernel(SDPBackend.MATH):
        scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    aten, ours = torch.ops.aten, attention_formulas(model)
    forward = ours[aten._scaled_dot_product_flash_attention_for_cpu](q.shape)
    backward = ours[aten._scaled_dot_product_flash_attention_for_cpu_backward](q.shape)
    diagonal = 2 * batch * heads * length * (wide + narrow)
    assert dense.get_total_flops() == 2 * (forward + backward) - 3 * diagonal
    assert forward == batch * heads * attention_flops(model.attention, length) // model.attention.num_attention_heads


def test_backward_runs_nothing_again_without_a_policy() -> None:
    batch = Batch(sequences=1, length=8, element=2)
    again = [recomputed_flops(presets.tiny().model, batch, policy) for policy in POLICIES]
    assert again[0] == 0 < again[1] < again[2] < cost.flops_per_token(presets.tiny().model, 8) * 8
