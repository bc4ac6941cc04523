"""Training on tasks of recall: what the model adds to the project's own, what is counted, and that it learns."""

import pytest
import torch

from ablations.attention_quality import configured
from bench.recall_tasks import NO_LABEL, Batch, Task, batch
from bench.recall_training import ShortConvolution, answers, at_step, kept_share, learn, model_of, total_loss
from dsv3.config import Everything, vary

TASK = Task(name="recall", length=128, block=1)


def test_the_convolution_adds_the_last_three_tokens_and_none_that_comes() -> None:
    convolution = ShortConvolution(2, seed=0, name="convolution")
    with torch.no_grad():
        convolution.weight.copy_(torch.tensor([[1.0, 0.0], [10.0, 1.0], [100.0, 0.0]]))
    x = torch.tensor([[[1.0, 1.0], [2.0, 3.0], [3.0, 5.0], [4.0, 7.0]]])
    assert convolution(x)[0, :, 0].tolist() == [2.0, 14.0, 126.0, 238.0]
    assert convolution(x)[0, :, 1].tolist() == [1.0, 4.0, 8.0, 12.0]


def test_arms_of_a_seed_start_from_the_same_weights() -> None:
    dense, tree, other = (
        model_of(configured(arm, length=128, steps=1), seed).state_dict()
        for arm, seed in (("dense", 0), ("hierarchical", 0), ("dense", 1))
    )
    assert all(torch.equal(dense[name], tree[name]) for name in dense | tree)
    assert any("convolution" not in name and name.endswith("1.weight") for name in dense)
    assert not torch.equal(dense["layers.0.input_layernorm.1.weight"], dense["layers.1.input_layernorm.1.weight"])
    assert not torch.equal(dense["layers.0.input_layernorm.1.weight"], other["layers.0.input_layernorm.1.weight"])


def test_the_loss_is_the_mean_over_labels_and_nothing_where_none_is() -> None:
    model = model_of(configured("dense", length=128, steps=1), seed=0)
    rows = batch(TASK, 2, seed=0, step=0)
    logits, labels = answers(model(torch.from_numpy(rows.tokens)), rows)
    assert labels.tolist() == rows.labels[rows.labels != NO_LABEL].tolist()
    expected = -logits.log_softmax(-1)[torch.arange(len(labels)), labels].mean()
    torch.testing.assert_close(total_loss(model, rows, Everything()), expected)
    silent = Batch(rows.tokens, rows.labels * 0 + NO_LABEL)
    assert total_loss(model, silent, Everything()).item() == 0.0


def test_an_indexer_learns_on_rows_that_ask_nothing_too() -> None:
    config = configured("indexer", length=128, steps=1)
    model, rows = model_of(config, seed=0), batch(TASK, 2, seed=0, step=0)
    silent = Batch(rows.tokens, rows.labels * 0 + NO_LABEL)
    loss = total_loss(model, silent, config.model.attention.select)
    loss.backward()
    moved = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert loss.item() > 0
    assert moved
    assert all("indexer" in name for name in moved)


def test_the_share_kept_is_that_of_pairs_of_the_triangle() -> None:
    rows = batch(TASK, 1, seed=0, step=0)
    shares = {
        arm: kept_share(model_of(configured(arm, length=128, steps=1), seed=0), rows)
        for arm in ("dense", "window", "per_head", "blocks", "hierarchical")
    }
    visible = 128 * 129 // 2
    window = sum(min(t + 1, 16) for t in range(128)) / visible
    assert shares == {
        "dense": 1.0,
        "window": window,
        "per_head": window,
        "blocks": pytest.approx(window),
        "hierarchical": pytest.approx(window),
    }


def test_rows_grow_to_their_length_and_are_whole_for_two_fifths_of_the_steps() -> None:
    task = Task(name="straddle", length=1024, block=16)
    assert [at_step(task, step, 10).length for step in range(1, 11)] == [128, 128, 256, 256, 512, 512, *[1024] * 4]
    shortest = Task(name="recall", length=64, block=1)
    assert at_step(shortest, 1, 10) == shortest, "there are no shorter rows than these"


def test_a_loss_that_is_not_finite_ends_the_training() -> None:
    config = vary(
        configured("dense", length=128, steps=50), **{"train.optimizer.lr": 1e30, "train.clip_grad_norm": 1e30}
    )
    with pytest.raises(FloatingPointError, match="loss=nan at step"):
        learn(config, TASK, seed=0, look_every=100, held_out=1)


@pytest.mark.slow
def test_dense_attention_learns_to_recall_and_a_window_that_cannot_reach_does_not() -> None:
    """In rows of 128 a window of 16 in two layers, with convolutions, reaches 34 tokens back: to few pairs or none."""
    found = {
        arm: learn(
            vary(configured(arm, length=128, steps=200), **{"train.batch_size": 32}),
            TASK,
            seed=0,
            look_every=50,
            held_out=2,
        )
        for arm in ("dense", "window")
    }
    assert found["dense"].accuracy >= 0.99
    assert found["dense"].reached in (100, 150, 200)
    assert found["window"].accuracy < 0.5
    assert found["window"].reached is None
