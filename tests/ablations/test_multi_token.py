"""The study of multi-token prediction: its arms, what it counts, and what it makes of records."""

import pytest
import torch

from ablations import multi_token
from ablations.claims import Outcome, ledger
from ablations.evidence import NoEvidence
from ablations.multi_token import STUDY, acceptance, answer, configured, flops_ratio, main_head_gains
from ablations.traced import Prose
from bench.fingerprint import provenance
from bench.measurement import Measurement, Point, record
from bench.record import Record
from dsv3.config import MTP, vary
from dsv3.model import Transformer
from dsv3.model.cost import flops_per_token
from dsv3.train.evaluate import HeldOut

WHERE = provenance("full")


def kept(arm: str, metric: str, value: float, seed: int, **axes: str | int) -> Record:
    where = {"device": "cpu", "look": "training", "steps": 40, "tokens": 512} | axes
    point = Point(study=STUDY.name, arm=arm, baseline="none", seed=seed, axes=where)
    return record(point, WHERE, Measurement(metric=metric, value=value))


def records(gain: float, seeds: int = 6) -> list[Record]:
    rows = []
    for seed in range(seeds):
        base, noise = 3.0 + 0.1 * seed, 0.001 * (seed % 3)
        rows += [
            kept("none", "bits_per_byte", base, seed),
            kept("one", "bits_per_byte", base - gain + noise, seed),
            kept("none_longer", "bits_per_byte", base - 0.2, seed),
            kept("one", "mtp_acceptance", 0.5, seed, depth=1),
            kept("one", "step_cpu_ratio", 1.5 + noise, seed, look="speed", threads=1, deepest=1),
        ]
    return rows


def test_arms_differ_in_modules_and_the_longer_one_in_steps_alone() -> None:
    arms = {name: configured(name, tokens=512, steps=40) for name in multi_token.DEPTHS}
    assert [config.model.mtp and config.model.mtp.num_nextn_predict_layers for config in arms.values()] == [
        None,
        1,
        2,
        None,
    ]
    for config in arms.values():
        assert vary(config, **{"model.mtp": None, "train.steps": 40}) == arms["none"]
    assert arms["one"].train.steps == 40


def test_the_longer_arm_spends_the_flops_of_one_module() -> None:
    one, longer = (configured(name, tokens=512, steps=200) for name in ("one", "none_longer"))
    spent = [c.train.steps * flops_per_token(c.model, multi_token.LENGTH, training=True) for c in (one, longer)]
    assert spent[1] == pytest.approx(spent[0], rel=0.5 / 200)
    assert flops_ratio(2) - 1 == pytest.approx(2 * (flops_ratio(1) - 1), rel=0.02)


def test_quick_cells_leave_out_what_only_full_asks() -> None:
    assert {cell.arm for cell in STUDY.cells("quick")} == {"none", "one", "none_longer", None}
    assert {cell.arm for cell in STUDY.cells("full")} == {"none", "one", "two", "none_longer", None}
    assert {cell.seed for cell in STUDY.cells("full")} == set(range(6))


def test_acceptance_is_one_for_a_module_that_repeats_the_main_head() -> None:
    """With a head of zeros all guess token 0; with a drawn one, agreement is chance."""
    config = configured("two", tokens=512, steps=1).model
    model = Transformer(config)
    rows = torch.randint(config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    heldout = HeldOut(rows=rows, domains=torch.zeros(2), names=("text",), text_bytes=torch.ones(2))
    drawn = acceptance(model, heldout)
    assert len(drawn) == 2
    assert max(drawn) < 0.5
    assert model.lm_head is not None
    torch.nn.init.zeros_(model.lm_head.weight)
    assert acceptance(model, heldout) == [1.0, 1.0]


def test_modules_leave_the_main_head_as_it_is() -> None:
    tokens = torch.arange(10)[None]
    models = [Transformer(configured(arm, tokens=512, steps=1).model, seed=4).eval() for arm in ("none", "one", "two")]
    logits = [model(tokens).logits for model in models]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert isinstance(models[1].config.mtp, MTP)


@pytest.mark.parametrize("gain, outcome", [(0.05, Outcome.HOLDS), (-0.05, Outcome.FAILS), (0.001, Outcome.UNDECIDABLE)])
def test_the_verdict_asks_whether_the_interval_lies_at_or_below_zero(gain: float, outcome: Outcome) -> None:
    verdict = main_head_gains(ledger()["DS2"], records(gain))
    assert verdict.outcome == outcome
    assert verdict.n == 6


def test_the_answer_says_cost_and_quality_at_equal_tokens_and_at_equal_flops() -> None:
    text = Prose.of(answer(records(0.05)))
    for words in ("1.5 [", "-0.0490 [", "+0.1510 [", "50%", "1.04 times for DeepSeek-V3"):
        assert words in text, text


def test_without_records_there_is_no_answer() -> None:
    with pytest.raises(NoEvidence):
        answer([])
