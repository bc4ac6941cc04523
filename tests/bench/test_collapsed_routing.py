"""A collapse is as deep as asked, lies in the routers' weights alone, and both a bias and a gradient can undo it."""

import pytest
import torch
from torch import Tensor

from bench.collapsed_routing import asked, collapse, watched
from dsv3.config import Config, ExpertChoice, MoE, QuantileBias, SwitchLoss, vary
from dsv3.data.pack import Batches
from dsv3.data.prepare import prepare
from dsv3.moe import max_vio, quantile_bias, switch_loss
from dsv3.moe.bias import margins
from dsv3.train import TrainState
from tests.train import small

EXPERTS, K, MAX_VIO = 16, 2, 5.0


def config(*balance: ExpertChoice | QuantileBias | SwitchLoss) -> Config:
    moe = MoE(n_routed_experts=EXPERTS, num_experts_per_tok=K, moe_intermediate_size=8, balance=balance)
    changes = {"model.moe": moe, "model.mtp": None, "model.num_hidden_layers": 3, "train.batch_size": 16}
    return vary(small.config(), **changes)


@pytest.fixture
def rows() -> Tensor:
    return small.rows(config())[0]


@pytest.fixture
def state() -> TrainState:
    return TrainState.create(config(QuantileBias()), seed=0)


def violations(state: TrainState, rows: Tensor) -> list[float]:
    return max_vio(asked(state.model, rows)).tolist()


def test_every_layer_collapses_to_the_maxvio_that_is_asked(state: TrainState, rows: Tensor) -> None:
    assert max(violations(state, rows)) < MAX_VIO
    done = collapse(state, rows, favoured=2, violation=MAX_VIO)
    found = violations(state, rows)
    assert found == pytest.approx(done.max_vio)
    assert len(found) == 2
    a_token = 1 / (rows[:, 1:].numel() * K / EXPERTS)  # one more at an expert, of its mean load
    assert all(MAX_VIO <= violation <= MAX_VIO + 2 * a_token for violation in found)
    assert all(offset > 0 for offset in done.score_offset)


def test_only_the_weights_of_favoured_experts_move_and_no_bias(state: TrainState, rows: Tensor) -> None:
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    collapse(state, rows, favoured=2, violation=MAX_VIO)
    for name, value in state.model.state_dict().items():
        if name.endswith("gate.weight"):
            assert torch.equal(value[2:], before[name][2:])
            assert not torch.equal(value[:2], before[name][:2])
        else:
            assert torch.equal(value, before[name]), name


def test_a_bias_makes_up_for_the_collapse_and_a_loss_pulls_against_it(state: TrainState, rows: Tensor) -> None:
    collapse(state, rows, favoured=2, violation=MAX_VIO)
    layer, routing = state.expert_layers[0], state.model(rows[:, :-1]).routing[0]
    (pull,) = torch.autograd.grad(switch_loss(routing), layer.gate.weight)
    healthy = TrainState.create(state.config, seed=0).expert_layers[0].gate.weight
    towards = healthy - layer.gate.weight
    assert (pull * towards).sum() < 0, "descent goes back to where the weight was"
    bias = layer.gate.e_score_correction_bias
    for _ in range(10):
        bias.copy_(quantile_bias(bias, margins(routing.scores.detach(), bias, K), K))
        routing = state.model(rows[:, :-1]).routing[0]
    assert max_vio(routing.counts) < 0.3


@pytest.mark.parametrize(
    "favoured, violation, message",
    [(2, 7.5, r"violation=7.5: must be at most E / K - 1 = 7"), (16, 7.0, r"size=16.0: does not collapse the router")],
)
def test_a_collapse_that_cannot_be_is_refused(
    state: TrainState, rows: Tensor, favoured: int, violation: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        collapse(state, rows, favoured=favoured, violation=violation)


def test_loads_are_those_of_tokens_that_choose_also_under_experts_that_do(rows: Tensor) -> None:
    state = TrainState.create(config(ExpertChoice()), seed=0)
    loads = asked(state.model.train(), rows)
    assert (loads.sum(dim=1) == rows[:, 1:].numel() * K).all()
    assert (loads.amax(dim=1) > loads.amin(dim=1) + 1).all(), "experts that choose would be even"


def test_loads_are_seen_before_each_update_and_after_the_last() -> None:
    made = config(QuantileBias())
    prepared = prepare(made.data, made.model.vocab_size)
    batches = Batches(prepared.train, made.train.batch_size, made.train.sequence_length, 0)
    first, last = batches.next(), [batches.next() for _ in range(2)][-1]
    fresh, state = (TrainState.create(made, seed=0) for _ in range(2))
    again = Batches(prepared.train, made.train.batch_size, made.train.sequence_length, 0)
    seen = watched(state, again, 2)
    assert len(seen) == 3
    assert state.step == 2
    assert torch.equal(seen[0], asked(fresh.model, first))
    assert torch.equal(seen[2], asked(state.model, last))


def test_an_update_that_is_not_finite_ends_the_watch() -> None:
    made = config(SwitchLoss())
    prepared = prepare(made.data, made.model.vocab_size)
    state = TrainState.create(made, seed=0)
    assert state.model.lm_head is not None, "the output has a weight of its own"
    with torch.no_grad():
        state.model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="not finite"):
        watched(state, Batches(prepared.train, 4, 8, 0), 1)
