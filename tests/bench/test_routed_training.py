"""A training that is looked at: the looks change nothing, count what the mode has, and the end is each token's own."""

from typing import Any

import pytest
import torch

from bench.meters.load import excess_over_blocks, excess_over_layers, of_batches, to_mean
from bench.routed_training import loads, routed
from bench.training import train
from dsv3.config import Balance, ExpertChoice, SignBias, vary
from dsv3.data.prepare import Prepared, prepare
from dsv3.model import Transformer
from dsv3.moe.load import load_statistics
from dsv3.train import TrainState
from tests.train import small

STEPS = 3


def config(*balance: Balance) -> Any:
    return vary(small.config(balance), **{"train.steps": STEPS, "train.eval_sequences": 6})


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    made = config(SignBias())
    return prepare(made.data, made.model.vocab_size)


def test_looking_changes_no_step(prepared: Prepared) -> None:
    watched = routed(config(SignBias()), prepared, 0, range(1, STEPS + 1))
    alone = routed(config(SignBias()), prepared, 0, ())
    assert watched.loss == alone.loss
    assert torch.equal(watched.held_out, alone.held_out)
    assert list(watched.on_the_way) == [1, 2, 3]
    assert alone.on_the_way == {}


def test_looks_see_the_loads_that_the_steps_report(prepared: Prepared) -> None:
    made = config(SignBias())
    found = routed(made, prepared, 0, range(1, STEPS + 1))
    reports = train(TrainState.create(made, seed=0), prepared, 0)
    for step, report in enumerate(reports, start=1):
        seen = [load_statistics(layer, made.model.moe.num_experts_per_tok).max_vio for layer in found.on_the_way[step]]
        # the report may have more routers: those of multi-token prediction
        assert seen == pytest.approx(report.max_vio[: len(seen)])


def test_experts_that_choose_are_even_on_the_way_and_not_at_the_end(prepared: Prepared) -> None:
    made = config(ExpertChoice())
    found = routed(made, prepared, 0, (1,))
    tokens = made.train.batch_size * made.train.sequence_length
    for layer in found.on_the_way[1]:
        assert layer.sum() == tokens * made.model.moe.num_experts_per_tok
        assert layer.max() - layer.min() <= 1
    at_the_end = found.held_out.sum(dim=0)
    assert (at_the_end.sum(dim=1) == 6 * made.train.sequence_length * made.model.moe.num_experts_per_tok).all()
    assert (at_the_end.amax(dim=1) > at_the_end.amin(dim=1) + 1).all()


def test_a_row_has_the_same_loads_whatever_rows_stand_beside_it(prepared: Prepared) -> None:
    model = Transformer(config(ExpertChoice()).model, seed=0).eval()
    rows = torch.randint(0, model.config.vocab_size, (5, 33), generator=torch.Generator().manual_seed(0))
    together = loads(model, rows)
    assert torch.equal(together, torch.cat([loads(model, row[None]) for row in rows]))


def test_figures_of_batches_are_means_over_batches_and_layers() -> None:
    even, one = torch.full((1, 4), 8), torch.tensor([[32, 0, 0, 0]])
    found = of_batches([even, one], 1, ranks=2)
    assert found["max_vio"] == pytest.approx(1.5)
    assert found["dead_experts"] == pytest.approx(1.5)
    assert found["rank_max_vio"] == pytest.approx(0.5)
    assert found["effective_experts"] == pytest.approx(2.5)


def test_layers_are_compared_after_the_mean_over_batches() -> None:
    batches = [torch.tensor([[9, 7], [16, 0]]), torch.tensor([[7, 9], [0, 16]])]
    found = excess_over_layers(batches, 1)
    each = [load_statistics(layer, 1).excess_max_vio for layer in batches[0]]
    assert found["mean"] == pytest.approx(sum(each) / 2)
    assert found["p50"] == pytest.approx(sum(each) / 2)
    assert found["max"] == pytest.approx(each[1])
    assert each[0] < found["p95"] < found["max"]


def test_shuffled_blocks_that_are_even_over_all_are_at_their_floor() -> None:
    random = torch.Generator().manual_seed(0)
    # each row prefers one expert of eight; which is random, so that batches are uneven and all rows are nearly even
    preferred = torch.randint(0, 8, (512,), generator=random)
    rows = 1 + 24 * torch.nn.functional.one_hot(preferred, 8)
    # 64 batches against 200: the mean of a maximum has a standard error of about 5%
    assert excess_over_blocks(rows[:, None], 1, 8) == pytest.approx(1.0, abs=0.15)
    assert excess_over_blocks(rows[:, None] + torch.tensor([40, 0, 0, 0, 0, 0, 0, 0]), 1, 8) > 1.5


def test_loads_to_the_mean() -> None:
    assert to_mean(torch.tensor([3, 1, 0, 0])) == [3.0, 1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"counts=\[0, 0\]: must be of at least one token"):
        to_mean(torch.zeros(2, dtype=torch.int64))
