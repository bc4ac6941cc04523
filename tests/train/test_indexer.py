"""Training with an indexer: what each stage moves, what it reports, and how one stage follows the other."""

import pytest
import torch

from dsv3.config import SGD, AdamW, BFloat16, Config, Float8Block, Indexer, vary
from dsv3.parallel import ALONE
from dsv3.train.loss import loss_parts
from dsv3.train.state import TrainState
from dsv3.train.step import StepReport, train_step
from tests.train import small

INDEXER = Indexer(index_n_heads=4, index_head_dim=8, index_topk=3)
ROUNDING = 2e-6  # sums of some thousand fp32 terms (eps 6e-8) in another order


def config(stage: str, **changes: object) -> Config:
    select = {"model.attention.select": vary(INDEXER, stage=stage)}
    return small.config(**{"train.optimizer": AdamW(lr=3e-3)} | select | changes)


def trained(config: Config, steps: int = 1) -> tuple[TrainState, list[StepReport]]:
    state = TrainState.create(config, seed=0)
    return state, [train_step(state, rows) for rows in small.rows(config, batches=steps)]


def apart(state: TrainState) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights and buffers of the model, and those of its indexers."""
    weights = {name: value.clone() for name, value in state.model.state_dict().items()}
    learning = {name: value for name, value in weights.items() if ".indexer." in name}
    return {name: value for name, value in weights.items() if name not in learning}, learning


def test_the_parts_add_up_to_the_total_and_are_summed_over_the_layers() -> None:
    parts = trained(config("sparse"))[1][0].losses
    assert parts["total"] == pytest.approx(
        parts["main"] + 0.3 * parts["mtp"] + parts["balance_sequence"] + parts["indexer"], rel=1e-6
    )
    tokens = small.rows(config("sparse"))[0][:, :-1]
    output = TrainState.create(config("sparse"), seed=0).model.train()(tokens)
    losses = [kept.loss.item() for kept in output.selection if kept is not None and kept.loss is not None]
    assert len(losses) == 3, "two layers, and the one of multi-token prediction"
    assert parts["indexer"] == pytest.approx(sum(losses), rel=1e-6)
    assert all(loss > 0 for loss in losses)


def test_the_loss_weight_scales_the_loss_and_zero_leaves_it_out() -> None:
    one, half, none = (
        trained(config("sparse", **{"model.attention.select.loss_weight": w}))[1][0] for w in (1.0, 0.5, 0)
    )
    assert half.losses["indexer"] == pytest.approx(one.losses["indexer"] / 2, rel=1e-6)
    assert "indexer" not in none.losses


@pytest.mark.parametrize("precision", [None, BFloat16(), Float8Block()], ids=str)
def test_warming_up_moves_the_indexers_alone_and_they_learn(precision: object) -> None:
    changes = {} if precision is None else {"train.precision": precision}
    made = config("warmup", **{"train.optimizer": AdamW(lr=1e-2)} | changes)
    before, at_first = apart(TrainState.create(made, seed=0))
    state, rows = TrainState.create(made, seed=0), small.rows(made)[0]
    reports = [train_step(state, rows) for _ in range(40)]
    after, learned = apart(state)
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert all(not torch.equal(learned[name], value) for name, value in at_first.items())
    assert reports[-1].losses["indexer"] < 0.8 * reports[0].losses["indexer"]
    assert all(report.health == "ok" for report in reports)


def test_beside_an_indexer_all_else_trains_as_if_its_loss_were_another_bit_for_bit() -> None:
    """Clipping included: the gradient of each is cut to its own norm."""
    tight = {"train.clip_grad_norm": 1e-2}
    states = [trained(config("sparse", **tight | {"model.attention.select.loss_weight": w}))[0] for w in (1e-3, 1e3)]
    first, second = (apart(state)[0] for state in states)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_the_reported_norm_is_that_of_the_whole_gradient() -> None:
    made = config("sparse", **{"train.clip_grad_norm": 1e6})
    state = TrainState.create(made, seed=0)
    rows = small.rows(made)[0]
    output = state.model.train()(rows[:, :-1])
    loss_parts(output, rows, made, ALONE.mean)["total"].backward()
    whole = small.flat({n: p.grad for n, p in state.model.named_parameters() if p.grad is not None}).norm().item()
    assert trained(made)[1][0].grad_norm == pytest.approx(whole, rel=1e-5)


def test_accumulation_changes_only_rounding() -> None:
    moved = []
    for parts in (1, 4):
        descent = {"train.optimizer": SGD(lr=1.0), "train.accumulation_steps": parts}
        made = config("sparse", **descent)
        before, after = (apart(state)[1] for state in (TrainState.create(made, seed=0), trained(made)[0]))
        moved.append(small.flat(after) - small.flat(before))
    assert small.relative_distance(*moved) < ROUNDING


def test_a_dense_model_warms_an_indexer_up_and_goes_on_sparsely() -> None:
    dense, _ = trained(small.config(), steps=3)
    warm = TrainState.create(config("warmup"), seed=1)
    lacking = warm.model.load_state_dict(dense.model.state_dict(), strict=False)
    assert lacking.unexpected_keys == []
    assert all(".indexer." in name for name in lacking.missing_keys)
    for rows in small.rows(warm.config, batches=3):
        train_step(warm, rows)
    sparse = TrainState.create(config("sparse"), seed=2)
    sparse.model.load_state_dict(warm.model.state_dict())
    before, at_first = apart(sparse)
    for name, value in dense.model.state_dict().items():
        assert torch.equal(before[name], value), name
    train_step(sparse, small.rows(sparse.config)[0])
    after, learned = apart(sparse)
    assert not torch.equal(after["layers.1.self_attn.q_b_proj.weight"], before["layers.1.self_attn.q_b_proj.weight"])
    assert all(not torch.equal(learned[name], value) for name, value in at_first.items())
