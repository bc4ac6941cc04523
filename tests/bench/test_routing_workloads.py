"""Routing workloads: the bits they promise, loads against the closed forms, and what each of them is there to show.

Tests of chance use fixed seeds, and so pass or fail for good. With seeds left free each would fail falsely in at most
ALARM of all runs: binomial tests of E experts are at ALARM / E each, and the bounds on means are Hoeffding's.
"""

import math
import subprocess
import sys
from hashlib import sha256
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bench.routing_workloads import (
    EXACT,
    NAMES,
    ONE,
    Assignment,
    Workload,
    apportion,
    burst,
    draw,
    expected_loads,
    expected_overlap,
    shares,
    squared_deviation,
)

ALARM = 1e-6
BY_CHANCE = [name for name in NAMES if name not in EXACT]
SIZES = [(128, 2), (64, 8), (7, 1), (5, 4), (3, 3), (1, 1)]
BITS = {
    "balanced": "e02626e7f547867c",
    "zipf": "f87ed372fa898c2d",
    "bursty": "fff1e03b45ff9a79",
    "drifting": "f732a4698445169e",
    "hot_expert": "28b91a046f6ecc9b",
    "correlated_layers": "b7c4477c65a8ca7f",
    "adversarial": "f3fb6ec74e462319",
}
quick = settings(max_examples=40)


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    experts = draw(st.integers(1, 40))
    return Workload(
        name=draw(st.sampled_from(NAMES)),
        seed=draw(st.integers(0, 2**64)),
        tokens=draw(st.integers(0, 200)),
        experts=experts,
        k=draw(st.integers(1, experts)),
    )


def loads(workload: Workload, step: int, layer: int = 0) -> np.ndarray:
    return np.bincount(draw(workload, step=step, layer=layer).indices.ravel(), minlength=workload.experts)


def same(first: Assignment, second: Assignment) -> bool:
    return np.array_equal(first.indices, second.indices) and np.array_equal(first.weights, second.weights)


@quick
@given(workloads(), st.integers(0, 200), st.integers(0, 3))
def test_experts_of_a_token_are_distinct_all_pairs_are_counted_and_weights_add_up_to_1(
    workload: Workload, step: int, layer: int
) -> None:
    found = draw(workload, step=step, layer=layer)
    assert found.indices.shape == found.weights.shape == (workload.tokens, workload.k)
    assert all(len(set(row)) == workload.k for row in found.indices.tolist())
    counts = loads(workload, step, layer)
    assert len(counts) == workload.experts
    assert counts.sum() == workload.tokens * workload.k
    assert (found.weights > 0).all()
    # K roundings of quotients that are at most 1
    np.testing.assert_allclose(found.weights.sum(axis=1), 1.0, atol=workload.k * 2**-53)


@quick
@given(workloads(), st.integers(0, 200), st.integers(0, 3))
def test_expected_loads_add_up_to_the_pairs_and_none_exceeds_the_tokens(
    workload: Workload, step: int, layer: int
) -> None:
    expected = expected_loads(workload, step=step, layer=layer)
    assert expected.sum() == workload.tokens * workload.k
    assert (expected >= 0).all()
    assert (expected <= workload.tokens).all()
    if workload.name in EXACT:
        assert np.array_equal(loads(workload, step, layer), expected)


@quick
@given(workloads(), st.permutations(range(6)))
def test_a_step_is_the_same_whenever_it_is_asked_for(workload: Workload, order: list[int]) -> None:
    in_order = [draw(workload, step=step, layer=1) for step in range(6)]
    assert all(same(draw(workload, step=step, layer=1), in_order[step]) for step in order)


@quick
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.data())
def test_shares_add_up_stay_below_1_and_follow_their_weights(weights: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(weights)))
    found = apportion(weights, k)
    assert sum(found) == k * ONE
    assert all(0 <= share <= ONE for share in found)
    below = [(share, weight) for share, weight in zip(found, weights, strict=True) if share < ONE]
    rest, total = sum(share for share, _ in below), sum(weight for _, weight in below)
    assert all(abs(share * total - rest * weight) <= total for share, weight in below), "to one part of 2^32"


@pytest.mark.parametrize("name", NAMES)
def test_bits_are_those_of_any_other_machine(name: str) -> None:
    digest = sha256()
    for step, layer in ((0, 0), (1, 2), (1000, 1)):
        found = draw(Workload(name=name, seed=7, tokens=300, experts=24, k=3), step=step, layer=layer)
        digest.update(found.indices.astype("<i8").tobytes() + found.weights.astype("<f8").tobytes())
    assert digest.hexdigest()[:16] == BITS[name]


@pytest.mark.parametrize("name", NAMES)
def test_seed_step_and_layer_each_change_the_draw(name: str) -> None:
    workload = Workload(name=name, seed=0, tokens=64, experts=16, k=2)
    first = draw(workload, step=0)
    other = draw(Workload(name=name, seed=1, tokens=64, experts=16, k=2), step=0)
    assert not any(same(first, found) for found in (other, draw(workload, step=1), draw(workload, step=0, layer=1)))


@pytest.mark.parametrize("experts, k", SIZES)
@pytest.mark.parametrize("name", BY_CHANCE)
def test_the_count_of_each_expert_is_binomial_about_the_closed_form(name: str, experts: int, k: int) -> None:
    workload = Workload(name=name, tokens=20_000, experts=experts, k=k)
    for step, layer in ((3, 0), (24, 2)):
        chances = shares(workload, step=step, layer=layer)
        for count, chance in zip(loads(workload, step, layer), chances, strict=True):
            test = stats.binomtest(int(count), workload.tokens, chance / ONE)
            assert test.pvalue > ALARM / (2 * experts), f"{count} against {chance / ONE * workload.tokens:.1f}"


@pytest.mark.parametrize("name", BY_CHANCE)
def test_with_one_expert_per_token_counts_pass_a_chi_square_test(name: str) -> None:
    workload = Workload(name=name, tokens=20_000, experts=64, k=1)
    expected = expected_loads(workload, step=24, layer=1)
    there = expected > 0
    counts = loads(workload, 24, layer=1)
    assert counts[~there].sum() == 0
    if there.sum() > 1:
        assert stats.chisquare(counts[there], expected[there]).pvalue > ALARM
    else:
        assert name == "hot_expert"


def test_a_wrong_closed_form_is_seen() -> None:
    counts = loads(Workload(name="zipf", tokens=20_000, experts=64, k=1), 24)
    drifted = expected_loads(Workload(name="drifting", tokens=20_000, experts=64, k=1), step=24)
    assert stats.chisquare(counts, drifted).pvalue < ALARM


@pytest.mark.parametrize("name", NAMES)
def test_the_squared_deviation_is_that_of_binomial_counts_and_none_of_exact_ones(name: str) -> None:
    workload = Workload(name=name, tokens=4096, experts=64, k=4)
    found = np.array([squared_deviation(workload, loads(workload, step, 1), step=step, layer=1) for step in range(100)])
    if name in EXACT:
        assert not found.any()
    else:
        # Steps are independent, and their mean is 1 without an error of any approximation.
        assert stats.ttest_1samp(found, 1.0).pvalue > ALARM
        assert found.mean() == pytest.approx(1.0, abs=0.1)


def test_the_squared_deviation_is_counted_by_hand_and_grows_with_a_wrong_closed_form() -> None:
    workload = Workload(name="bursty", tokens=16, experts=4, k=2)
    assert not burst(workload, step=0)
    # Of 16 tokens each expert expects 8, with variance 16 / 2 / 2 = 4.
    assert squared_deviation(workload, np.array([8, 8, 10, 6]), step=0) == pytest.approx((0 + 0 + 1 + 1) / 4)
    drifting = Workload(name="drifting", tokens=4096, experts=64, k=4)
    assert squared_deviation(drifting, loads(drifting, 40), step=0) > 10


def test_an_expert_of_every_choice_must_have_every_token() -> None:
    workload = Workload(name="hot_expert", tokens=50, experts=8, k=2)
    counts = loads(workload, 3)
    hot = int(counts.argmax())
    counts[hot] -= 1
    with pytest.raises(ValueError, match=rf"experts=\[{hot}\]: must have all tokens or none"):
        squared_deviation(workload, counts, step=3)


def test_zipf_is_one_over_the_place_until_an_expert_would_be_in_every_choice() -> None:
    harmonic = sum(1 / place for place in range(1, 9))
    found = np.sort(shares(Workload(name="zipf", tokens=0, experts=8, k=2), step=0))[::-1] / ONE
    np.testing.assert_allclose(found, [2 / harmonic / place for place in range(1, 9)], rtol=1e-8)
    full = np.sort(shares(Workload(name="zipf", tokens=0, experts=8, k=4), step=0))[::-1] / ONE
    assert full[0] == 1.0
    np.testing.assert_allclose(full[1:], [3 / (harmonic - 1) / place for place in range(2, 9)], rtol=1e-8)


def test_balanced_gives_each_expert_as_many_tokens_or_one_more() -> None:
    assert loads(Workload(name="balanced", tokens=512, experts=32, k=4), 5).tolist() == [64] * 32
    counts = loads(Workload(name="balanced", tokens=7, experts=5, k=3), 0)
    assert sorted(counts.tolist()) == [4, 4, 4, 4, 5]


def test_a_quarter_of_the_windows_burst_and_then_an_eighth_of_the_experts_takes_half() -> None:
    workload = Workload(name="bursty", tokens=64, experts=64, k=2)
    windows = [[burst(workload, step=window * 8 + at) for at in range(8)] for window in range(2000)]
    assert all(len(set(window)) == 1 for window in windows)
    assert stats.binomtest(sum(window[0] for window in windows), 2000, 0.25).pvalue > ALARM
    first = next(at for at, window in enumerate(windows) if window[0]) * 8
    for step in range(first, first + 8):
        expected = np.sort(expected_loads(workload, step=step))
        np.testing.assert_allclose(expected[-8:], 64 * 2 / 2 / 8, rtol=1e-8)
        np.testing.assert_allclose(expected[:-8], 64 * 2 / 2 / 56, rtol=1e-8)


def test_drifting_is_zipf_at_every_sixteenth_step_and_one_place_on_each_time() -> None:
    workload = Workload(name="drifting", tokens=1, experts=12, k=2)
    whole = [shares(workload, step=16 * q) for q in range(13)]
    zipf = np.sort(shares(Workload(name="zipf", tokens=1, experts=12, k=2), step=0))
    assert all(np.array_equal(np.sort(found), zipf) for found in whole)
    assert np.array_equal(whole[0], whole[12]), "after E places the head is where it was"
    assert len({int(found.argmax()) for found in whole}) == 12
    halfway = shares(workload, step=8)
    np.testing.assert_allclose(halfway, (whole[0] + whole[1]) / 2, atol=1)


def test_the_hot_expert_is_in_every_choice_and_the_others_are_even() -> None:
    workload = Workload(name="hot_expert", tokens=500, experts=16, k=4)
    counts, expected = loads(workload, 9), expected_loads(workload, step=9)
    hot = int(counts.argmax())
    assert counts[hot] == expected[hot] == 500
    np.testing.assert_allclose(np.delete(expected, hot), 500 * 3 / 15, rtol=1e-8)
    alone = loads(Workload(name="hot_expert", tokens=500, experts=16, k=1), 9)
    assert sorted(alone.tolist()) == [0] * 15 + [500]


@pytest.mark.parametrize("experts, k", [(64, 1), (64, 8), (12, 3)])
def test_layers_share_as_many_experts_as_the_closed_form_says(experts: int, k: int) -> None:
    workload = Workload(name="correlated_layers", tokens=20_000, experts=experts, k=k)
    layers = [draw(workload, step=1, layer=layer).indices for layer in range(6)]
    # Hoeffding's bound for a mean of independent numbers in [0, K]
    most = k * math.sqrt(math.log(2 / (ALARM / 3)) / (2 * workload.tokens))
    for apart in (1, 2, 5):
        found = (layers[0][:, :, None] == layers[apart][:, None, :]).sum(axis=(1, 2)).mean()
        assert found == pytest.approx(expected_overlap(workload, apart=apart), abs=most)
    independent = (shares(workload, step=1) / ONE) ** 2
    assert expected_overlap(workload, apart=1) - independent.sum() > 3 * most, "the bound tells the layers apart"


def test_the_adversary_is_never_where_it_was_and_everywhere_in_the_long_run() -> None:
    workload = Workload(name="adversarial", tokens=96, experts=64, k=2)
    steps = [loads(workload, step) for step in range(8)]
    assert all((now * before).sum() == 0 for before, now in pairwise(steps))
    assert np.sum(steps, axis=0).tolist() == [8 * 96 * 2 / 64] * 64
    for counts in steps:
        attacked = np.flatnonzero(counts)
        assert attacked.tolist() == list(range(attacked[0], attacked[0] + 8))
        assert set(counts[attacked].tolist()) == {24}
    assert loads(Workload(name="adversarial", tokens=6, experts=7, k=5), 3).tolist() == [5, 5, 4, 4, 4, 4, 4]


def test_every_pair_of_experts_is_drawn_together_as_often_where_all_are_equal() -> None:
    workload = Workload(name="bursty", tokens=64 * 3000, experts=6, k=2)
    assert not burst(workload, step=0)
    found = np.sort(draw(workload, step=0).indices, axis=1)
    _, times = np.unique(found, axis=0, return_counts=True)
    assert len(times) == math.comb(6, 2)
    # A group of 64 tokens draws from one order, three pairs of the 15: its counts of a pair lie in [0, 64].
    most = 64 * math.sqrt(3000 * math.log(2 * 15 / ALARM) / 2)
    assert np.abs(times - workload.tokens / 15).max() <= most


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"name": "even"}, "name='even': must be one of balanced, zipf, "),
        ({"k": 9}, "k=9: must be at most experts=8"),
        ({"k": 0}, "k=0: must be a whole number of at least 1"),
        ({"tokens": -1}, "tokens=-1: must be a whole number of at least 0"),
        ({"seed": 0.5}, "seed=0.5: must be a whole number of at least 0"),
    ],
)
def test_a_workload_that_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    fields = {"name": "zipf", "tokens": 4, "experts": 8, "k": 2} | changes
    with pytest.raises(ValueError, match=message):
        Workload(**fields)  # type: ignore[arg-type]


def test_steps_layers_and_closed_forms_that_are_not_there_are_refused() -> None:
    workload = Workload(name="balanced", tokens=4, experts=8, k=2)
    with pytest.raises(ValueError, match="step=-1: must be a whole number"):
        draw(workload, step=-1)
    with pytest.raises(ValueError, match="layer=-2: must be a whole number"):
        expected_loads(workload, step=0, layer=-2)
    with pytest.raises(ValueError, match="name='balanced': must be a workload drawn by chance"):
        shares(workload, step=0)
    with pytest.raises(ValueError, match="name='balanced': must be correlated_layers"):
        expected_overlap(workload, apart=1)


def test_workloads_need_no_torch() -> None:
    check = "import sys, bench.routing_workloads; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
