"""Training with a choice of blocks that learns: its loss is a part of the total, and every way takes a step."""

from typing import get_args, get_type_hints

import pytest

from dsv3.config import Blocks, Config, MultiHead
from dsv3.train.state import TrainState
from dsv3.train.step import StepReport, train_step
from tests.train import small


def config(learns: str, **changed: object) -> Config:
    select = Blocks(k=3, block_q=1, block_k=1, learns=learns, **changed)
    return small.config(**{"model.attention": MultiHead(num_attention_heads=2, head_dim=8, select=select)})


def step(config: Config) -> StepReport:
    return train_step(TrainState.create(config, seed=0), small.rows(config)[0])


@pytest.mark.parametrize("learns", get_args(get_type_hints(Blocks)["learns"]))
def test_every_way_takes_a_step_and_one_alone_has_a_loss_of_its_own(learns: str) -> None:
    report = step(config(learns))
    assert report.health == "ok"
    assert ("distilled" in report.losses) == (learns == "distilled")


def test_the_loss_is_weighed_and_a_part_of_the_total() -> None:
    one, half = (step(config("distilled", loss_weight=weight)).losses for weight in (1.0, 0.5))
    assert one["distilled"] > 0
    assert half["distilled"] == pytest.approx(one["distilled"] / 2, rel=1e-6)
    assert half["total"] - one["total"] == pytest.approx(-one["distilled"] / 2, abs=1e-5)
