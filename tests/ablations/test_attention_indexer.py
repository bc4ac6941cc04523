"""The study of V3.2's indexer: its counts against the cost of whole models, its crossings, and what it says."""

import pytest
import torch

from ablations import attention_indexer as study
from ablations.evidence import NoEvidence
from ablations.study import Reading
from bench import indexed_attention as indexed
from bench.fingerprint import provenance
from bench.measurement import Measurement, Point, record
from bench.record import Record
from dsv3.config import presets, vary
from dsv3.model.cost import decode_flops, flops_per_token

WHERE = provenance("full")


@pytest.mark.parametrize("length", [1500, 2048, 2049, 20000])
def test_a_layer_costs_what_it_adds_to_a_model(length: int) -> None:
    v3, v32 = (vary(preset().model, mtp=None) for preset in (presets.deepseek_v3, presets.deepseek_v32))
    layers = v3.num_hidden_layers
    prompt = flops_per_token(v32, length, mtp=False) - flops_per_token(v3, length, mtp=False)
    mine = study.flops_per_token("indexer", "prefill", length) - study.flops_per_token("dense", "prefill", length)
    assert layers * mine == pytest.approx(prompt)
    token = decode_flops(v32, length) - decode_flops(v3, length)
    assert token == layers * (
        study.flops_per_token("indexer_absorbed", "decode", length) - study.flops_per_token("dense", "decode", length)
    )


def test_absorbed_pairs_cost_what_the_wider_latent_costs() -> None:
    few, many = (
        [study.flops_per_token(arm, "prefill", length) for arm in ("indexer", "indexer_absorbed")]
        for length in (1, 4096)
    )
    # one token sees one key: 128 heads x (576 + 512 against 192 + 128) multiply-adds
    assert few[1] - few[0] == 2 * 128 * (576 + 512 - 192 - 128)
    assert many[1] - many[0] == pytest.approx((few[1] - few[0]) * 2048 * (1 - 2047 / 2 / 4096))


def test_the_crossings_are_the_first_lengths_that_save() -> None:
    found = {(row.arm, row.axes["phase"]): row.measurement.value for row in measured("crossover_length")}
    assert found.keys() == {("indexer", "prefill"), ("indexer_absorbed", "prefill"), ("indexer_absorbed", "decode")}
    for (arm, phase), length in found.items():
        cost = {n: study.flops_per_token(arm, phase, n) for n in (int(length) - 1, int(length))}
        dense = {n: study.flops_per_token("dense", phase, n) for n in cost}
        assert [cost[n] < dense[n] for n in sorted(cost)] == [False, True]


def test_a_crossing_that_is_not_there_is_no_evidence() -> None:
    assert study.crossing(lambda length: length >= 77) == 77
    with pytest.raises(NoEvidence, match="nothing is saved up to"):
        study.crossing(lambda length: False)


def test_a_decoded_token_reads_the_selected_rows_and_every_index_key() -> None:
    assert study.read_bytes("dense", 4096) == 2 * 4096 * 576
    assert study.read_bytes("indexer_absorbed", 4096) == 2 * (2048 * 576 + 4096 * 128)
    assert study.read_bytes("indexer_absorbed", 2048) == study.read_bytes("dense", 2048)


@pytest.mark.parametrize("arm", indexed.ARMS)
def test_the_timed_layer_agrees_with_its_other_form(arm: str) -> None:
    indexed.check(arm)


def test_a_layer_that_sees_other_keys_fails_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    fewer = vary(indexed.INDEXER, index_topk=indexed.TOPK // 2)
    monkeypatch.setitem(indexed.ARMS, "indexer", vary(indexed.LATENT, select=fewer))
    with pytest.raises(AssertionError):
        indexed.check("indexer")


@pytest.mark.parametrize("arm", indexed.ARMS)
def test_the_timed_token_is_the_last_of_the_timed_prompt(arm: str) -> None:
    whole, last = (indexed.call(arm, phase, 400)() for phase in ("prefill", "decode"))
    torch.testing.assert_close(last, whole[:, -1:], rtol=0.0, atol=indexed.rounding(whole))


def test_the_answer_has_the_crossings_and_the_longest_time() -> None:
    rows = [kept(row.arm, row) for row in study.counts()]
    said = study.answer(rows)
    assert "small layer" not in said
    for arm, metric, ratios in (
        ("indexer", "forward_cpu_ratio", (0.9, 1.1, 0.8)),
        ("indexer_absorbed", "forward_cpu_ratio", (4.0, 3.0, 2.0)),
        ("indexer_absorbed", "decode_cpu_ratio", (0.9, 0.8, 0.5)),
    ):
        for seed in range(6):
            for length, ratio in zip((1024, 2048, 8192), ratios, strict=True):
                found, axes = Measurement(metric=metric, value=ratio), {"length": length, "threads": 1}
                rows.append(kept(arm, Reading(arm="", measurement=found, axes=axes), seed))
    said = study.answer(rows)
    assert "At 8192 tokens the prefill takes 2" in said
    assert "a decoded token 0.5" in said
    assert "an expanded prefill from 8192 tokens on, not shown at 2048 tokens;" in said
    assert "an absorbed one shown at none up to 8192 tokens;" in said
    assert "a decoded token from 1024 tokens on." in said


def measured(metric: str) -> list[Reading]:
    return [row for row in study.counts() if row.measurement is not None and row.measurement.metric == metric]


def kept(arm: str, row: Reading, seed: int | None = None) -> Record:
    assert row.measurement is not None
    axes = {"device": "cpu"} | dict(row.axes)
    point = Point(study=study.STUDY.name, arm=arm, baseline=study.STUDY.baseline, seed=seed, axes=axes)
    return record(point, WHERE, row.measurement)
