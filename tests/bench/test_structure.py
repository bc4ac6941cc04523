"""What is measured of a piece of work is all of what it does: one tensor more in a training step is seen."""

import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import structure, variants
from bench.differences import differences
from bench.meters.saved import saved_bytes
from dsv3.model import Transformer, cost
from dsv3.moe.dispatch import kernel_instructions
from dsv3.moe.fastest import fastest
from dsv3.moe.kernels.experts import why_not
from dsv3.parallel import ALONE
from dsv3.precision import autocast
from dsv3.train.loss import loss_parts
from dsv3.train.state import TrainState


def test_a_step_measures_the_same_twice_and_agrees_with_the_analytic_count() -> None:
    first = structure.measure_step(variants.base())
    assert first == structure.measure_step(variants.base())
    assert first["parameters"] == cost.parameters(variants.base().model)
    assert first["live_bytes"] > first["peak_bytes"] > first["saved_bytes"] > 0
    # AdamW keeps two more numbers per parameter, and a step count for each tensor; names and places take some room.
    tensors = sum(1 for _ in Transformer(variants.base().model, seed=0).parameters())
    model_bytes = sum(buffer.nbytes for buffer in Transformer(variants.base().model, seed=0).state_dict().values())
    held = {"model.pt": model_bytes, "optimizer.pt": first["parameters"] * 8 + tensors * 4}
    assert all(size < first["checkpoint_bytes"][name] < 1.05 * size for name, size in held.items())
    assert set(first["checkpoint_bytes"]) == {*held, "progress.pt", "manifest.json"}


def test_a_checkpoint_is_as_large_as_its_files_and_not_as_its_tensors() -> None:
    class Wasteful(TrainState):
        def state_dict(self) -> dict[str, Any]:
            return {"model": {"w": torch.zeros(1000)[:1]}}  # one number, written with all of its storage

    plain = TrainState.create(variants.base(), seed=0)
    state = Wasteful(config=plain.config, model=plain.model, optimizer=plain.optimizer, loss_scale=None)
    assert structure.checkpoint_bytes(state)["model.pt"] > 4000


@pytest.mark.parametrize("name", ["base", "multi_token_prediction", "accumulation", "bfloat16"])
def test_saved_bytes_are_those_of_the_whole_loss_on_what_the_step_runs(name: str) -> None:
    config = variants.variant(name)
    state = TrainState.create(config, seed=0)
    rows = variants.drawn_tokens()[: variants.BATCH // config.train.accumulation_steps]

    def forward() -> torch.Tensor:
        with autocast(config.train.precision, "cpu"):
            output = state.model(rows[:, :-1])
        return loss_parts(output, rows, config, ALONE.mean)["total"]

    by_hand = saved_bytes(forward, state.model.parameters()).value
    assert structure.measure_step(config)["saved_bytes"] == by_hand


def test_a_step_is_left_where_it_goes_backward_and_backward_works_again() -> None:
    x = torch.ones(3, requires_grad=True)
    done: list[str] = []

    def call(_: None) -> None:
        x.exp().sum().backward()
        done.append("backward")

    loss = structure.first_loss(call, None)
    assert (done, x.grad) == ([], None)
    loss.backward()
    assert x.grad is not None


def test_no_garbage_is_collected_in_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    collecting: list[bool] = []
    step = variants.train_step
    monkeypatch.setattr(variants, "train_step", lambda *built: (collecting.append(gc.isenabled()), step(*built)))
    structure.measure_step(variants.base())
    assert collecting == [True] + [False] * 5  # the first call is the warm-up of the memory's region
    assert gc.isenabled()


def test_one_tensor_more_in_a_training_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    before = structure.measure_step(variants.base())
    step = variants.train_step

    def wasteful(*built: Any) -> None:
        torch.empty(1)
        step(*built)

    monkeypatch.setattr(variants, "train_step", wasteful)
    changes = list(differences(before, structure.measure_step(variants.base())))
    assert [change.where for change in changes] == ["allocations", "operators.aten.empty.memory_format"]
    assert all((change.found or 0) - (change.expected or 0) == 1 for change in changes)


def test_another_dispatch_of_the_experts_is_seen_and_named_by_its_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = variants.BATCH * variants.LENGTH * 2 // 8
    taken = fastest(kernel_instructions(), torch.float32, "training", rows)
    as_is = structure.measure_step(variants.base())
    found = {}
    for name in ("looped", "grouped", *(() if why_not() else ("kernel",))):
        monkeypatch.setattr("dsv3.moe.dispatch.fastest", lambda *_, name=name: name)
        found[name] = structure.measure_step(variants.base())
        assert bool(list(differences(as_is, found[name]))) == (name != taken)
    named = {"grouped": "aten._grouped_mm.default", "kernel": "dsv3_experts.forward.default"}
    for name, figures in found.items():
        ran = [kind for kind, operator in named.items() if operator in figures["operators"]]
        assert ran == [name] * (name in named)


def test_an_empty_tensor_more_in_a_training_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    before = structure.measure_step(variants.base())
    step = variants.train_step
    monkeypatch.setattr(variants, "train_step", lambda *built: (torch.empty(0), step(*built)))
    (change,) = differences(before, structure.measure_step(variants.base()))  # no bytes: no allocation
    assert change.where == "operators.aten.empty.memory_format"


@pytest.mark.parametrize("decode", [False, True])
def test_serving_measures_the_same_twice(decode: bool) -> None:
    found = structure.measure_serving(variants.variant("per_head"), decode=decode)
    assert found == structure.measure_serving(variants.variant("per_head"), decode=decode)
    assert found["flops"] > 0


def test_decoding_works_on_one_token_and_prefill_on_all() -> None:
    prefill, decode = (structure.measure_serving(variants.base(), decode=decode) for decode in (False, True))
    assert decode["flops"] < prefill["flops"] / variants.LENGTH * 2


def test_a_waiting_host_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    before = structure.measure_step(variants.base())["host_synchronisations"]
    step = variants.train_step

    def waiting(state: Any, rows: torch.Tensor) -> None:
        step(state, rows)
        rows.sum().item()

    monkeypatch.setattr(variants, "train_step", waiting)
    assert structure.measure_step(variants.base())["host_synchronisations"] == before + 1


@pytest.mark.parametrize("inference", [False, True])
def test_waits_are_counted_in_inference_mode_too_where_they_have_other_names(inference: bool) -> None:
    def call(_: None) -> None:
        with torch.inference_mode(inference):
            x = torch.ones(2)
            x.sum().item()
            bool(x[0] > 0)
            x.nonzero()

    assert structure.work(lambda: None, call)[0]["host_synchronisations"] == 3


def test_drops_are_the_loads_beyond_the_slots() -> None:
    moe = variants.base().model.moe
    assert moe is not None
    indices = structure.drawn_routing(moe)
    loads = indices.flatten().bincount(minlength=moe.n_routed_experts).tolist()
    slots = {factor: math.ceil(indices.numel() / moe.n_routed_experts * factor) for factor in structure.FACTORS}
    refused = {f"{factor:g}": sum(max(0, load - most) for load in loads) for factor, most in slots.items()}
    assert structure.measure_drops() == {"drops": refused}
    assert refused["1"] > 0


def test_two_processes_send_every_gradient_once() -> None:
    sent = structure.measure_two_processes()["two_processes"]["collectives"]
    gradients = 4 * cost.parameters(variants.base().model)
    assert gradients <= sum(row["bytes"] for row in sent.values()) < 1.01 * gradients
    assert sum(row["calls"] for row in sent.values()) == 4  # losses, kept pairs, loads, and all gradients in one


def test_every_kind_of_work_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("measure_step", "measure_serving", "measure_compiled"):
        monkeypatch.setattr(structure, name, lambda *_, **__: {})
    monkeypatch.setattr(structure, "measure_two_processes", lambda: {"two_processes": {}})
    monkeypatch.setattr(structure, "loss_of_rows", lambda _: ())
    measured = set(structure.measure())
    assert set(variants.works()) < measured
    assert measured - set(variants.works()) == {
        "compiled_base",
        "compiled_window",
        "drops",
        "two_processes",
        *(f"plan_{schedule.name}" for schedule in structure.SCHEDULES),
    }


def test_what_is_handed_to_a_collective_is_counted_in_calls_and_bytes(tmp_path: Path) -> None:
    structure.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        with structure.Operators() as ran:
            structure.distributed.all_reduce(torch.zeros(3))
            structure.distributed.all_reduce(torch.zeros(2))
            torch.zeros(4).add_(1)
    finally:
        structure.distributed.destroy_process_group()
    assert structure.collectives(ran) == {"c10d.allreduce_.default": {"calls": 2, "bytes": 20}}


def test_the_plans_idle_as_their_closed_forms_say() -> None:
    # GPipe and 1F1B: each of p ranks idles (p - 1) (f + b + w).
    plans = structure.measure_plans()
    idle = structure.PIPELINE_RANKS * (structure.PIPELINE_RANKS - 1) * 3.0
    assert plans["plan_gpipe"] == plans["plan_one_f_one_b"] == {"bubble_slots": idle}
