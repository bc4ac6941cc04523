"""Small cases worked by hand: the schedule, the parts of the loss, decay groups, bits per byte, the command line."""

import math
import shlex

import pytest
import torch
from torch.nn import functional as F

from dsv3.config import (
    SGD,
    AdamW,
    BFloat16,
    Fixed,
    MultiHead,
    QuadraticLoss,
    Schedule,
    SequenceLoss,
    SwitchLoss,
    presets,
    vary,
)
from dsv3.model import ModelOutput, Transformer
from dsv3.moe import balance_losses
from dsv3.parallel import ALONE
from dsv3.train import optimizer as optimizers
from dsv3.train.evaluate import HeldOut, evaluate
from dsv3.train.loss import cross_entropy, loss_parts
from dsv3.train.options import parse, with_variant
from dsv3.train.schedule import share_of_peak
from dsv3.train.state import TrainState
from dsv3.train.step import StepReport
from tests.train import small


def test_the_schedule_rises_stays_and_falls_by_shares_of_the_run() -> None:
    schedule = Schedule(warmup=0.2, decay=0.4, final=0.1)
    shares = [share_of_peak(schedule, step, steps=10) for step in range(1, 11)]
    falling = [0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2 for x in (0.25, 0.5, 0.75, 1.0)]
    assert shares == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, *falling])
    assert shares[7] == pytest.approx(0.55)
    assert shares[9] == pytest.approx(0.1)
    assert share_of_peak(schedule, 99, steps=10) == pytest.approx(0.1)


def test_a_schedule_without_phases_is_constant() -> None:
    flat = Schedule(warmup=0.0, decay=0.0)
    assert [share_of_peak(flat, step, steps=3) for step in (1, 2, 3)] == [1.0, 1.0, 1.0]


def test_cross_entropy_of_equal_logits_is_the_log_of_the_vocabulary() -> None:
    targets = torch.randint(0, 7, (2, 3))
    assert cross_entropy(torch.zeros(2, 3, 7), targets).item() == pytest.approx(math.log(7))
    half = cross_entropy(torch.zeros(2, 3, 7, dtype=torch.bfloat16), targets)
    assert half.dtype == torch.float32


def test_the_depths_of_multi_token_prediction_have_their_own_targets() -> None:
    rows = torch.tensor([[0, 1, 2, 3]])
    sure = [F.one_hot(rows[:, ahead:], 4) * 100.0 for ahead in (1, 2, 3)]
    output = ModelOutput(logits=sure[0], mtp_logits=(sure[1], sure[2]))
    parts = loss_parts(output, rows, small.config(), ALONE.mean)
    assert {name: value.item() for name, value in parts.items()} == pytest.approx(
        {"main": 0.0, "mtp": 0.0, "total": 0.0}, abs=1e-6
    )
    unsure = ModelOutput(logits=sure[0], mtp_logits=(sure[1], torch.zeros(1, 1, 4)))
    parts = loss_parts(unsure, rows, small.config(), ALONE.mean)
    assert parts["mtp"].item() == pytest.approx(math.log(4) / 2)
    assert parts["total"].item() == pytest.approx(0.3 * math.log(4) / 2)


def test_the_total_is_the_sum_of_the_named_parts_over_all_expert_layers() -> None:
    balance = (SequenceLoss(alpha=0.1), SwitchLoss(alpha=0.2), QuadraticLoss(alpha=0.3))
    config = small.config(balance)
    (rows,) = small.rows(config)
    output = Transformer(config.model)(rows[:, :-1])
    parts = loss_parts(output, rows, config, ALONE.mean)
    assert list(parts) == ["main", "mtp", "balance_sequence", "balance_switch", "balance_quadratic", "total"]
    assert len(output.routing) == 2, "one layer of the model and one of multi-token prediction"
    assert config.model.moe is not None
    by_layer = [balance_losses(routing, config.model.moe, len(rows)) for routing in output.routing]
    for name in ("sequence", "switch", "quadratic"):
        assert parts[f"balance_{name}"].item() == pytest.approx(sum(layer[name].item() for layer in by_layer))
    weighted = {name: value.item() * (0.3 if name == "mtp" else 1.0) for name, value in parts.items()}
    total = weighted.pop("total")
    assert total == pytest.approx(sum(weighted.values()))


def test_matrices_decay_and_vectors_do_not() -> None:
    model = Transformer(small.config().model)
    matrices, vectors = optimizers.decay_groups(model, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert {names[id(p)].rsplit(".", 2)[-2] for p in vectors["params"]} >= {"norm", "input_layernorm", "enorm"}
    assert {names[id(p)] for p in matrices["params"]} >= {"embed_tokens.weight", "layers.1.mlp.experts.gate_up"}
    assert len(matrices["params"]) + len(vectors["params"]) == len(names)


def test_decay_pulls_a_matrix_and_leaves_a_norm_when_there_is_no_gradient() -> None:
    model = Transformer(small.config().model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = optimizers.build(model, AdamW(lr=0.5, weight_decay=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = dict(model.named_parameters())
    torch.testing.assert_close(after["lm_head.weight"], before["lm_head.weight"] * (1 - 0.5 * 0.1))
    assert torch.equal(after["norm.weight"], before["norm.weight"])


def test_plain_descent_moves_against_the_gradient() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = optimizers.build(model, SGD(lr=0.5))
    model.weight.grad = torch.tensor([[2.0]])
    before = model.weight.item()
    optimizer.step()
    assert model.weight.item() == pytest.approx(before - 1.0)


def test_bits_per_byte_of_a_uniform_model_are_the_bits_of_its_vocabulary_over_the_bytes() -> None:
    config = vary(small.config(), **{"model.moe": None, "model.mtp": None})
    state = TrainState.create(config, seed=0)
    assert state.model.lm_head is not None
    torch.nn.init.zeros_(state.model.lm_head.weight)
    rows = torch.randint(0, small.VOCABULARY, (5, 9))
    heldout = HeldOut(
        rows=rows,
        domains=torch.tensor([0, 0, 2, 2, 2]),
        names=("prose", "code", "text"),
        text_bytes=torch.tensor([16, 16, 8, 8, 8]),
    )
    measured = evaluate(state.model, heldout, step=3, batch_size=2, precision=config.train.precision)
    bits = math.log2(small.VOCABULARY)
    assert measured.step == 3
    assert measured.bits_per_byte == pytest.approx(40 * bits / 56, rel=1e-6)
    assert measured.by_domain == pytest.approx({"prose": bits / 2, "text": bits}, rel=1e-6)


def test_a_report_gives_bits_per_byte_when_the_bytes_are_known() -> None:
    fields = {"step": 1, "losses": {"main": math.log(2)}, "grad_norm": 1.0, "lr": 0.1, "tokens": 30}
    times = {"seconds": 1.0, "cpu_seconds": 1.0, "max_vio": (), "dropped": 0.0, "health": "ok"}
    assert StepReport(**fields, **times).bits_per_byte is None  # type: ignore[arg-type]
    assert StepReport(**fields, **times, text_bytes=60).bits_per_byte == pytest.approx(0.5)  # type: ignore[arg-type]


def test_the_command_line_sets_presets_fields_and_variants() -> None:
    options = parse(
        shlex.split(
            "--preset article_small --steps 7 --seed 3 --train.optimizer.lr 0.5 "
            "--variant model.moe.capacity='Fixed(factor=2.0)' --model.moe.capacity.policy position "
            "--variant train.precision='BFloat16()' "
            "--variant model.attention='MultiHead(num_attention_heads=2, head_dim=64)'"
        )
    )
    assert (options.preset, options.seed, options.config.train.steps) == ("article_small", 3, 7)
    assert options.config.train.optimizer == AdamW(lr=0.5)
    assert options.config.train.precision == BFloat16()
    assert options.config.model.moe is not None
    assert options.config.model.moe.capacity == Fixed(factor=2.0, policy="position")
    assert options.config.model.attention == MultiHead(num_attention_heads=2, head_dim=64)


def test_without_options_the_command_line_is_the_tiny_preset() -> None:
    assert parse([]).config == presets.tiny()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--preset", "huge"], r"preset='huge': must be one of tiny, small"),
        (["--steps", "0"], "steps=0: must be a whole number"),
        (["--resume", "--overwrite", "--out", "x"], "go on with a run or replace it"),
        (["--resume"], "needs the run's folder"),
        (["--data", "/no/such/folder"], "no such file or folder"),
        (["--variant", "model.moe"], "must be PATH=VARIANT"),
        (["--variant", "model.moe.capacity=Fixed(factor=)"], "write the variant as in Python"),
        (["--variant", "model.moe.capacity=Flexible(factor=1)"], "Flexible is none of"),
        (["--variant", "model.moe.capacity=vary(factor=1)"], "vary is none of"),
        (["--variant", "model.moe.capacity=Fixed(factor=open('x'))"], "is neither Variant"),
        (["--variant", "model.moe.size=3"], "MoE has no field 'size'"),
        (["--variant", "model.moe.capacity=Fixed(factor=0)"], "factor=0: must be a finite number > 0"),
        (["--variant", "model.moe.capacity=Fixed(factr=1)"], "unexpected keyword argument 'factr'"),
        (["--variant", "model.moe.capacity=Fixed()"], "missing 1 required .* 'factor'; give the fields of Fixed"),
        (["--variant", "model.moe.capacity=3"], "capacity=3: must be one of Dropless, Fixed, Adaptive"),
    ],
)
def test_a_wrong_command_line_is_refused_by_name(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(arguments)


@pytest.mark.parametrize("arguments", [["--stepz", "3"], ["--train.stepz", "3"], ["--device", "tpu"], ["--steps", "x"]])
def test_an_unknown_option_ends_with_its_name(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_variant_may_be_none_a_number_or_a_tuple_of_variants() -> None:
    config = with_variant(with_variant(presets.tiny(), "model.mtp=None"), "train.steps=5")
    assert config.model.mtp is None
    assert config.train.steps == 5
    varied = with_variant(config, "model.moe.balance=(SequenceLoss(alpha=0.5),)")
    assert varied.model.moe is not None
    assert varied.model.moe.balance == (SequenceLoss(alpha=0.5),)
