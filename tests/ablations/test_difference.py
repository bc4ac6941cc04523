"""What an arm changes is read off the configs, and what is no longer equal is said."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ablations import STUDIES
from ablations import __main__ as command
from ablations.catalogue import load
from ablations.code import ROOT
from ablations.difference import DROPS, Difference, Quantity, changes, differences, quantities, told
from ablations.moe_capacity import CAPACITIES
from dsv3.config import MTP, SGD, Dropless, Fixed, Float16, SignBias, SwitchLoss, digest, presets, vary
from dsv3.train import TrainState
from reports.baseline import against_baseline

BASE = presets.tiny()


def of(study: str, arm: str) -> Difference:
    return next(found for found in differences(load(study)) if found.arm == arm)


def test_a_config_does_not_differ_from_itself() -> None:
    assert list(changes(BASE, presets.tiny())) == []


def test_every_field_that_vary_changes_is_found_by_its_path() -> None:
    varied = {"model.moe.capacity": Fixed(factor=1.2), "train.optimizer.lr": 1e-4, "train.steps": 7}
    found = {factor.field: (factor.old, factor.new) for factor in changes(BASE, vary(BASE, **varied))}
    assert found == {
        "model.moe.capacity": ("Dropless()", "Fixed(factor=1.2)"),
        "train.optimizer.lr": ("0.003", "0.0001"),
        "train.steps": ("300", "7"),
    }


def test_an_exchanged_variant_is_one_factor() -> None:
    found = list(changes(BASE, vary(BASE, **{"train.precision": Float16(), "model.mtp": None})))
    assert [str(factor) for factor in found] == ["model.mtp: MTP() -> None", "train.precision: Float32() -> Float16()"]


@pytest.mark.parametrize(
    "value, text",
    [
        (MTP(num_nextn_predict_layers=2), "MTP(num_nextn_predict_layers=2)"),
        ((SignBias(rate=0.5), SwitchLoss()), "(SignBias(rate=0.5), SwitchLoss())"),
        (Dropless(), "Dropless()"),
        (None, "None"),
    ],
)
def test_a_value_is_told_without_its_defaults(value: object, text: str) -> None:
    assert told(value) == text


def test_a_quantity_off_by_more_than_one_percent_is_not_matched() -> None:
    assert Quantity(name="n", unit="", old=1000, new=1009).matched
    assert not Quantity(name="n", unit="", old=1000, new=989).matched
    assert Quantity(name="n", unit="", old=1000, new=250).ratio == 0.25


def test_a_longer_run_differs_in_tokens_alone_and_a_module_in_size_and_work() -> None:
    longer, one = of("multi_token", "none_longer"), of("multi_token", "one")
    assert {row.name for row in longer.unmatched} == {"tokens", "FLOPs"}
    size, work = {"parameters", "active parameters", "weight bytes", "optimizer bytes"}, {"FLOPs per token", "FLOPs"}
    assert {row.name for row in one.unmatched} == size | work
    steps = [row.new for found in (longer, one) for row in found.quantities if row.name == "FLOPs"]
    assert steps[0] == pytest.approx(steps[1], rel=0.01), "equal FLOPs is what the longer run is for"


def test_bytes_are_those_that_training_keeps() -> None:
    found = {row.name: row for row in quantities(BASE, vary(BASE, **{"train.optimizer": SGD()}))}
    state = TrainState.create(BASE, seed=0)
    weights = list(state.model.parameters())
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    state.optimizer.step()
    moments = [kept for each in state.optimizer.state.values() for kept in each.values() if kept.ndim]
    kept, moved = (sum(tensor.nbytes for tensor in tensors) for tensors in (weights, moments))
    assert (found["weight bytes"].old, found["weight bytes"].new) == (kept, kept)
    assert (found["optimizer bytes"].old, found["optimizer bytes"].new) == (moved, 0)
    assert [row.name for row in found.values() if not row.matched] == ["optimizer bytes"]
    back = quantities(vary(BASE, **{"train.optimizer": SGD()}), BASE)
    assert [row.ratio for row in back if row.name == "optimizer bytes"] == [math.inf]


def test_what_a_capacity_drops_is_said_where_no_config_tells_it(capsys: pytest.CaptureFixture[str]) -> None:
    capacity = {found.arm: found for found in differences(load("moe_capacity"))}
    assert capacity["factor_1"].unmatched == ()
    assert capacity["factor_1"].unsettled == (DROPS,)
    assert capacity["no_loss"].unsettled == (), "neither drops"
    assert of("precision_modes", "fp32_nudged").unsettled == (), "the same config"
    assert of("latent_attention", "latent").unsettled == ()
    assert command.main(["diff", "moe_capacity"]) == 0
    assert capsys.readouterr().out.count(DROPS.split(":")[0]) == len(CAPACITIES) - 1
    (table,) = against_baseline(load("moe_capacity"), [])
    assert [row[-1] for row in table.rows].count(DROPS) == len(CAPACITIES) - 1


def test_forms_of_attention_are_matched_in_parameters_and_not_in_cache() -> None:
    for arm in ("grouped", "single", "latent"):
        unmatched = {row.name for row in of("latent_attention", arm).unmatched}
        assert "cache bytes per token" in unmatched
        assert "parameters" not in unmatched


def test_an_arm_without_a_config_says_so() -> None:
    found = of("precision_modes", "fp8_tensor")
    assert (found.configured, found.changes, found.quantities) == (False, (), ())
    nudged = of("precision_modes", "fp32_nudged")
    assert (nudged.configured, nudged.changes) == (True, ())


@pytest.mark.parametrize("name", ["moe_capacity", "precision_modes", "latent_attention", "multi_token"])
def test_the_declared_run_of_an_arm_is_the_one_that_the_reference_records_ran(name: str) -> None:
    study = load(name)
    loss = study.compared[0].metric
    ran: dict[str, str] = {}
    for line in (ROOT / "reports" / "reference" / "records.jsonl").read_text().splitlines():
        row = json.loads(line)
        if (row["study"], row["metric"], row["profile"]) == (name, loss, "full"):
            ran[row["arm"]] = row["config"]
    assert len(ran) > 1
    for arm, config in ran.items():
        assert digest(study.config(arm)) == config


def test_the_command_shows_every_arm_and_loads_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["diff", "multi_token"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "train.steps: 120 -> 174" in said
    assert "tokens 1.45x (245,760 -> 356,352)" in said
    code = "import sys, ablations.__main__ as m; m.main(['diff', 'moe_capacity']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_study_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["diff", str(tmp_path / "none.py")]) == 2
    assert "there is no such file" in capsys.readouterr().out


@pytest.mark.parametrize("name", STUDIES)
def test_a_baseline_is_not_compared_with_itself(name: str) -> None:
    study = load(name)
    assert [found.arm for found in differences(study)] == [a.name for a in study.arms if a.name != study.baseline]
