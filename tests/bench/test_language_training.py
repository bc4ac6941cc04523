"""A language model trained some steps: when it looks, what is trailing, and that it learns."""

import math

import pytest
import torch

from bench import language_training
from bench.language_training import TRAILING, last_part, learn, nats_of
from dsv3.config import AdamW, Config, Model, MultiHead, Schedule, Train
from dsv3.data.prepare import Prepared, prepare


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare(config().data, 257)


def config() -> Config:
    shape = MultiHead(num_attention_heads=1, head_dim=16)
    model = Model(vocab_size=257, hidden_size=16, num_hidden_layers=1, intermediate_size=32, attention=shape)
    train = Train(
        steps=50, batch_size=2, sequence_length=64, optimizer=AdamW(lr=1e-2), schedule=Schedule(warmup=0, decay=0)
    )
    return Config(model=model, train=train)


def test_it_looks_on_the_way_and_at_the_end(prepared: Prepared) -> None:
    for steps, seen in ((5, [2, 4, 5]), (4, [2, 4])):
        looks, _ = learn(config(), prepared, 0, steps=steps, every=2, held_out=2)
        assert [look.step for look in looks] == seen


def test_it_learns_and_the_model_it_returns_is_the_one_it_looked_at(prepared: Prepared) -> None:
    looks, model = learn(config(), prepared, 0, steps=50, every=25, held_out=4)
    assert looks[0].loss < math.log(257)
    assert looks[-1].loss < looks[0].loss - 0.2
    rows = language_training.heldout_rows(prepared.validation, 64, 4)[0]
    nats = nats_of(lambda row: model(row).logits, rows)
    assert (nats.mean().item(), nats[:, 48:].mean().item()) == (looks[-1].loss, looks[-1].trailing_loss)


def test_losses_of_equal_logits_are_those_of_chance() -> None:
    rows = torch.randint(0, 7, (3, 13))
    nats = nats_of(lambda row: torch.zeros(*row.shape, 7), rows)
    assert nats.shape == (3, 12)
    torch.testing.assert_close(nats, torch.full((3, 12), math.log(7), dtype=torch.float64), rtol=1e-6, atol=0)
    assert last_part(nats).shape == (3, 12 // TRAILING)


def test_an_update_that_is_not_made_ends_the_training(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_training, "sick_steps", lambda reports: f"step {reports[0].step}: skipped")
    with pytest.raises(FloatingPointError, match="step 1: skipped"):
        learn(config(), prepared, 0, steps=4, every=2, held_out=2)
