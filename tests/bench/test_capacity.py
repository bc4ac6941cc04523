"""What a capacity refuses and leaves empty, by hand, and steps under it that leave the model as it was."""

import pytest
import torch

from bench.capacity import Limited, figures, frozen, past, refusals, routed, step_blocks
from dsv3.config import Adaptive, Config, Dropless, Fixed, MoE
from dsv3.moe import MoELayer, Routing
from dsv3.moe.capacity import drop
from dsv3.moe.routing import count
from dsv3.train import TrainState, train_step
from tests.moe.layers import layer_of
from tests.train import small

FOUR = MoE(n_routed_experts=4, num_experts_per_tok=1, moe_intermediate_size=8, capacity=Fixed(factor=1.5))
SENT = Fixed(factor=1.5, policy="reroute")


def routing_of(layer: MoELayer) -> Routing:
    """Eight tokens: five at expert 0, and one at each of the others."""
    indices = torch.tensor([0, 0, 0, 0, 0, 1, 2, 3])[:, None]
    routing = Routing(indices, torch.ones(8, 1), torch.rand(8, 4), count(indices, 4))
    return drop(routing, layer.moe, layer.moe.capacity) if isinstance(layer.moe.capacity, Fixed) else routing


def test_shares_by_hand() -> None:
    """Three slots an expert: two of five are refused, and of twelve slots six are taken."""
    layer = layer_of(FOUR)
    found = figures(layer, routing_of(layer))
    assert found["max_vio"] == 1.5
    assert found["capacity_factor"] == 1.5
    assert found["refused_share"] == found["drop_share"] == 2 / 8
    assert found["empty_slot_share"] == pytest.approx(6 / 12)
    assert 0 < found["drop_floor"] < 2 / 8


def test_what_is_sent_on_was_refused_and_is_not_dropped() -> None:
    layer = layer_of(MoE(n_routed_experts=4, num_experts_per_tok=1, moe_intermediate_size=8, capacity=SENT))
    found = figures(layer, routing_of(layer))
    assert found["refused_share"] == 2 / 8
    assert found["drop_share"] == 0.0
    assert found["empty_slot_share"] == pytest.approx(4 / 12)


def test_without_a_capacity_what_each_would_refuse_is_counted() -> None:
    layer = layer_of(MoE(n_routed_experts=4, num_experts_per_tok=1, moe_intermediate_size=8))
    routing = routing_of(layer)
    assert figures(layer, routing).keys() == {"max_vio", "excess_max_vio"}
    assert refusals(routing, layer.moe, (1.0, 1.5, 2.5)) == {1.0: 3 / 8, 1.5: 2 / 8, 2.5: 0.0}


@pytest.fixture
def config() -> Config:
    return small.config(**{"model.moe.capacity": Dropless()})


def test_steps_of_a_frozen_copy_cost_a_step_and_move_no_weight(config: Config) -> None:
    state = TrainState.create(config, seed=0)
    (rows,) = small.rows(config)
    copy = frozen(state)
    assert train_step(copy, rows).grad_norm > 0
    for name, parameter in copy.model.named_parameters():
        assert torch.equal(parameter, state.model.get_parameter(name)), name


def test_arms_that_share_a_model_leave_it_dropless(config: Config) -> None:
    state = frozen(TrainState.create(config, seed=0))
    (rows,) = small.rows(config)
    layers = state.expert_layers
    averages = tuple(torch.tensor(0.5) for _ in layers)
    arms = {
        "dropless": Limited(state, Dropless()),
        "fixed": Limited(state, Fixed(factor=0.5)),
        "adaptive": Limited(state, Adaptive(momentum=0.5), averages),
        "balanced": Limited(state, Fixed(factor=1.0), balanced=0),
    }
    dropped = {name: arm.step(rows).dropped for name, arm in arms.items()}
    assert dropped["dropless"] == dropped["balanced"] == 0.0
    assert dropped["fixed"] == pytest.approx(dropped["adaptive"])
    assert dropped["fixed"] > 0.3
    assert all(average > 0.5 for average in averages), "moved by the loads of the step"
    assert all(layer.moe.capacity == Dropless() and layer.largest_load is None for layer in layers)
    assert routed(state, rows)[0][1].kept is None


class Rows:
    """Batches that count how often they were asked for."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows, self.taken = rows, 0

    def next(self) -> torch.Tensor:
        self.taken += 1
        return self.rows


def test_blocks_take_a_batch_each(config: Config) -> None:
    state = frozen(TrainState.create(config, seed=0))
    batches = Rows(small.rows(config)[0])
    arms = {"a": Limited(state, Dropless()), "b": Limited(state, Fixed(factor=1.0))}
    blocks = step_blocks(arms, batches, 2)  # type: ignore[arg-type]
    assert [block.keys() for block in blocks] == [arms.keys()] * 2
    assert batches.taken == 3, "one to warm up"


def test_the_past_is_the_average_that_training_steps_would_have_left(config: Config) -> None:
    state = TrainState.create(config, seed=0)
    batches = Rows(small.rows(config)[0])
    loads = [routing.counts for _, routing in routed(state, batches.rows)]
    averages = past(state, batches, 2, 0.9)  # type: ignore[arg-type]
    assert [average.item() for average in averages] == pytest.approx(
        [(counts.max() / counts.double().mean()).item() for counts in loads]
    )
