"""Rates from times, peaks by card, ceilings of this machine."""

import tomllib

import pytest
import torch

from bench.measurement import Measurement
from bench.meters.ceiling import copy_rate, gemm_rate
from bench.peaks import TABLE, peak_flops
from bench.speed import format_name, model_flops_utilisation, rate

SECONDS = Measurement(metric="wall_seconds", value=0.5, n=2, over="blocks", interval=(0.25, 1.0), samples=(0.25, 1.0))


def test_a_rate_turns_the_interval_round() -> None:
    speed = rate(SECONDS, "tokens_per_second", 100)
    assert (speed.metric, speed.value, speed.n) == ("tokens_per_second", 200, 2)
    assert speed.interval == (100, 400)
    assert speed.samples == (400, 100)


def test_utilisation_is_the_share_of_the_card_s_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    share = model_flops_utilisation(SECONDS, 989.5e12 / 8, torch.bfloat16)
    assert isinstance(share, Measurement)
    assert (share.metric, share.value) == ("mfu", pytest.approx(0.25))


def test_an_unknown_card_is_pending_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Abacus 3000")
    why = model_flops_utilisation(SECONDS, 1.0, torch.bfloat16)
    assert isinstance(why, str)
    assert why.startswith("pending: peak unknown for Abacus 3000 in bfloat16")


def test_fp32_is_tf32_where_torch_may_round(monkeypatch: pytest.MonkeyPatch) -> None:
    assert format_name(torch.float32) == "float32"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert (format_name(torch.float32), format_name(torch.float16)) == ("tf32", "float16")


def test_each_card_stands_once_with_a_source_and_plausible_peaks() -> None:
    cards = tomllib.loads(TABLE.read_text())["card"]
    assert len({card["name"] for card in cards}) == len(cards)
    for card in cards:
        assert card["source"]
        peaks = card["peak"]
        assert peaks["float32"] <= peaks.get("tf32", peaks["float32"]) <= peaks["float16"]
    assert peak_flops("NVIDIA A100-SXM4-80GB", "float8") is None


def test_the_ceilings_are_those_of_a_computer() -> None:
    cpu = torch.device("cpu")
    product, copy = gemm_rate(cpu, calls=2), copy_rate(cpu, calls=2)
    assert 1e8 < product.value < 1e14
    assert 1e7 < copy.value < 1e13
