"""Scores are counted by the products that a call makes of rows of one width."""

import torch

from bench.meters.scores import scores

Q, NODES = torch.randn(2, 5, 11), torch.randn(2, 7, 11)


def test_every_number_of_a_product_of_matrices_is_a_score() -> None:
    assert scores(lambda: Q @ NODES.mT, 11) == 2 * 5 * 7
    assert scores(lambda: Q[0] @ NODES[0].T, 11) == 5 * 7


def test_every_row_of_a_product_number_by_number_is_a_score() -> None:
    assert scores(lambda: (Q[:, :, None] * NODES[:, None]).sum(-1), 11) == 2 * 5 * 7
    assert scores(lambda: NODES.clone().mul_(Q[:, :1]).sum(-1), 11) == 2 * 7


def test_nothing_else_is_a_score() -> None:
    assert scores(lambda: Q.mT @ Q, 11) == 0
    assert scores(lambda: (Q * 2, NODES.isfinite(), NODES.amax(1), Q[0, 0] * Q[0, 1]), 11) == 0
    assert scores(lambda: Q * NODES[:, :5], 10) == 0
