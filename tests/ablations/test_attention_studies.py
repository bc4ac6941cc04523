"""The studies of selected and of latent attention: their cells, and what they make of records."""

import pytest

from ablations import attention_sparsity as sparsity
from ablations import latent_attention as latent
from ablations.claims import Outcome, ledger
from ablations.evidence import NoEvidence
from ablations.study import Cell, Study
from bench.fingerprint import provenance
from bench.measurement import Measurement, Point, record
from bench.record import Record
from dsv3.config import vary
from dsv3.model.cost import parameters

LENGTHS = sparsity.LENGTHS["full"]
WHERE = provenance("full")


def kept(study: Study, arm: str, metric: str, value: float, seed: int | None, **axes: str | int) -> Record:
    where = {"device": "cpu"} | axes
    point = Point(study=study.name, arm=arm, baseline=study.baseline, seed=seed, axes=where)
    return record(point, WHERE, Measurement(metric=metric, value=value))


def timed(exponents: dict[str, float], at_16k: float) -> list[Record]:
    """Six processes in which each arm's time is a power of the length, with noise; share's ratio at 16K as given."""
    rows = []
    for seed in range(6):
        noise = 1 + 0.01 * (seed - 2.5)
        for arm, power in exponents.items():
            for length in LENGTHS:
                seconds = (length / 1024) ** power * noise
                rows.append(
                    kept(sparsity.STUDY, arm, "cpu_seconds", seconds, seed, phase="forward", length=length, threads=1)
                )
        for length in LENGTHS:
            for phase in sparsity.PHASES:
                for arm in ("window", "per_head_share", "per_head_dropped", "per_head_number", "blocks_share"):
                    ratio = at_16k * noise * 16384 / length
                    rows.append(kept(sparsity.STUDY, arm, f"{phase}_cpu_ratio", ratio, seed, length=length, threads=1))
    where: dict[str, str | int] = {"phase": "forward_backward", "threads": 1}
    for arm, peak in (("sdpa", 100.0), ("dense", 80.0), ("per_head_share", 160.0), ("per_head_dropped", 170.0)):
        rows.append(kept(sparsity.STUDY, arm, "peak_bytes", peak, 0, length=16384, **where))
    for arm, peak in (("eager", 1000.0), ("per_head_share", 40.0), ("per_head_dropped", 50.0)):
        rows.append(kept(sparsity.STUDY, arm, "peak_bytes", peak, 0, length=4096, **where))
    for arm, share in (("per_head_share", 0.3), ("per_head_dropped", 0.7)):
        rows.append(kept(sparsity.STUDY, arm, "selection_share", share, 0, length=16384, threads=1))
    return rows


EXPONENTS = {
    "sdpa": 2.0,
    "dense": 2.0,
    "window": 1.0,
    "per_head_share": 1.9,
    "per_head_dropped": 1.95,
    "per_head_number": 1.1,
    "blocks_share": 1.8,
}


def test_the_exponent_is_the_slope_that_made_the_times() -> None:
    rows = timed(EXPONENTS, 0.6)
    for arm, power in EXPONENTS.items():
        found = sparsity.exponent(rows, arm, LENGTHS)
        assert found.value == pytest.approx(power, abs=1e-9)
        assert found.n == 6
    with pytest.raises(NoEvidence):
        sparsity.exponent([row for row in rows if row.axes.get("length") != 2048], "window", LENGTHS)


@pytest.mark.parametrize("power, outcome", [(1.9, Outcome.FAILS), (1.12, Outcome.HOLDS)])
def test_complexity_is_judged_by_the_exponent(power: float, outcome: Outcome) -> None:
    rows = timed(EXPONENTS | {"per_head_share": power}, 0.6)
    verdict = sparsity.grows_like_n_log_n(ledger()["A1"], rows)
    assert verdict.outcome is outcome
    assert "1.12" in verdict.answer


@pytest.mark.parametrize("ratio, outcome", [(0.6, Outcome.FAILS), (0.3, Outcome.HOLDS), (1 / 2.1, Outcome.UNDECIDABLE)])
def test_speed_is_judged_against_sdpa_at_16k(ratio: float, outcome: Outcome) -> None:
    verdict = sparsity.inference_is_faster(ledger()["A3"], timed(EXPONENTS, ratio))
    assert verdict.outcome is outcome
    assert verdict.value == pytest.approx(1 / ratio, rel=0.01)
    assert "would allow 3.33" in verdict.answer
    assert "would allow 1.43" in verdict.answer
    assert "this project's dense kernel" in verdict.answer


def test_without_a_compiler_the_claims_are_judged_all_the_same() -> None:
    rows = [row for row in timed(EXPONENTS, 0.6) if row.arm not in ("dense", "blocks_share")]
    for claim, judge in (("A2", sparsity.memory_falls), ("A3", sparsity.inference_is_faster)):
        verdict = judge(ledger()[claim], rows)
        assert verdict.outcome is Outcome.FAILS
        assert "kernel" not in verdict.answer


def test_memory_is_judged_against_sdpa_and_says_what_eager_would_give() -> None:
    verdict = sparsity.memory_falls(ledger()["A2"], timed(EXPONENTS, 0.6))
    assert verdict.outcome is Outcome.FAILS
    assert verdict.value == pytest.approx(-0.6)
    for words in ("+60% memory", "+70%: fused", "0.96 and 0.95 of the bytes at 4096 tokens", "first takes +100%"):
        assert words in verdict.answer, verdict.answer


def test_the_answer_names_the_length_from_which_an_arm_pays() -> None:
    words = sparsity.answer(timed(EXPONENTS, 0.3))
    assert words.startswith("At 16384 tokens window takes 0.30 of SDPA's time")
    assert "faster from 8192 tokens on" in words
    assert "faster at no length measured" in sparsity.answer(timed(EXPONENTS, 1.3))


def test_growth_is_drawn_with_slopes_or_not_at_all() -> None:
    from reports.frame import summary

    picture = sparsity.growth(summary(timed(EXPONENTS, 0.6)))
    labels = [text.get_text() for text in picture.legends[0].get_texts()]
    assert labels == [f"{arm}: n^{power:.2f}" for arm, power in EXPONENTS.items()]
    with pytest.raises(NoEvidence, match="no record of forward cpu_seconds"):
        sparsity.growth(summary([row for row in timed(EXPONENTS, 0.6) if row.metric == "peak_bytes"]))


@pytest.mark.slow
def test_one_short_cell_measures_every_arm() -> None:
    cell = Cell(arm=None, seed=0, axes={"length": 256, "threads": 1}, seconds=5)
    readings = sparsity.measure(cell)
    assert not [reading for reading in readings if reading.measurement is None]
    found = {(reading.arm, reading.measurement.metric) for reading in readings if reading.measurement is not None}
    for arm in sparsity.ARMS:
        assert {(arm, "cpu_seconds"), (arm, "peak_bytes"), (arm, "selection_share")} <= found
        assert ((arm, "forward_cpu_ratio") in found) == (arm != "sdpa")


def test_eager_attention_says_when_its_matrices_do_not_fit() -> None:
    assert sparsity._missing(64, "forward") == ""
    assert "GiB for its matrices" in sparsity._missing(2**24, "forward")


def test_forms_of_the_tiny_model_have_the_same_number_of_parameters_within_a_percent() -> None:
    sizes = [parameters(latent.configured(form, tokens=512, steps=1).model) for form in latent.FORMS]
    assert max(sizes) < 1.01 * min(sizes)


def test_forms_differ_in_attention_alone() -> None:
    runs = [latent.configured(form, tokens=512, steps=40) for form in latent.FORMS]
    assert all(vary(run, **{"model.attention": runs[0].model.attention}) == runs[0] for run in runs)


def test_the_size_look_has_the_published_bytes_of_deepseek_v3() -> None:
    readings = latent.measure(Cell(arm=None, seed=None, axes={"look": "size"}, seconds=1))
    found = {
        (reading.arm, reading.axes["model"]): reading.measurement.value
        for reading in readings
        if reading.measurement is not None and reading.measurement.metric == "kv_bytes_per_token"
    }
    assert found["latent", "deepseek_v3"] == 70_272
    assert found["multi_head", "deepseek_v3"] == 61 * 2 * 128 * 128 * 2
    assert found["latent", "tiny"] < found["single", "tiny"] < found["grouped", "tiny"] < found["multi_head", "tiny"]


@pytest.mark.parametrize("gap, outcome", [(-0.02, Outcome.HOLDS), (0.05, Outcome.FAILS), (0.009, Outcome.UNDECIDABLE)])
def test_latent_attention_is_judged_by_its_gap(gap: float, outcome: Outcome) -> None:
    rows = []
    for seed in range(6):
        noise = 0.001 * (seed % 3)
        for arm, bits in (("multi_head", 3.0), ("latent", 3.0 + gap + noise)):
            rows.append(kept(latent.STUDY, arm, "bits_per_byte", bits + seed, seed, look="training", steps=40))
    for model, bytes_of in (("tiny", (2048, 640)), ("deepseek_v3", (3_997_696, 70_272))):
        for arm, value in zip(("multi_head", "latent"), bytes_of, strict=True):
            rows.append(kept(latent.STUDY, arm, "kv_bytes_per_token", value, None, look="size", model=model))
    verdict = latent.caches_less_and_models_no_worse(ledger()["DS1"], rows)
    assert verdict.outcome is outcome
    assert "3.2 times fewer bytes of cache (57 times at DeepSeek-V3's size)" in verdict.answer
