"""The decision errs as seldom as it says whenever one looks, finds what is there, and sees only what it should."""

import math
from itertools import product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from bench.ab.decide import (
    ALPHA,
    MARGIN,
    Rate,
    alarms,
    decide,
    decided,
    evidence,
    found,
    interval,
    slower_and_faster,
)

RATIO = st.floats(0.5, 2.0)
MANY = st.lists(RATIO, max_size=40)
OPPOSITE = {"slower": "faster", "faster": "slower", "same": "same", "not enough evidence": "not enough evidence"}


def noisy(random: Random, blocks: int, *, slower: float = 1.0, spread: float = 0.035) -> list[float]:
    """Ratios as a busy machine gives them: two processes' noise, and a spike now and then."""
    spiked = [random.choice([1.0] * 38 + [1.4, 1 / 1.4]) for _ in range(blocks)]
    return [slower * spike * random.lognormvariate(0.0, spread) for spike in spiked]


@pytest.mark.parametrize("won, bets", [(0, 0), (1, 1), (6, 6), (10, 10), (14, 15), (3, 20), (40, 60)])
def test_evidence_is_the_average_growth_over_the_weight(won: int, bets: int) -> None:
    def growth(q: float) -> float:
        return q**16 * (2 * q) ** won * (2 * (1 - q)) ** (bets - won)

    weight, _ = integrate.quad(lambda q: q**16, 0.5, 1)
    average, _ = integrate.quad(growth, 0.5, 1)
    assert evidence(won, bets) == pytest.approx(average / weight, rel=1e-8)


@given(st.integers(0, 200), st.integers(0, 200))
def test_a_fair_bet_neither_gains_nor_loses(won: int, lost: int) -> None:
    now = evidence(won, won + lost)
    after = (evidence(won + 1, won + lost + 1) + evidence(won, won + lost + 1)) / 2
    assert after == pytest.approx(now, rel=1e-9)
    assert evidence(won + 1, won + lost + 1) > evidence(won, won + lost + 1)


def test_thousands_of_blocks_are_still_numbers() -> None:
    assert math.isfinite(evidence(5000, 5000))
    assert evidence(10, 5000) == 0.0


def test_who_stops_at_the_best_moment_is_wrong_no_more_often_than_the_level() -> None:
    random, runs, wrong = Random(0), 3000, 0
    for _ in range(runs):
        won = 0
        for bets in range(1, 101):
            won += random.random() < 0.5
            if evidence(won, bets) >= 1 / ALPHA:
                wrong += 1
                break
    assert wrong / runs <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / runs)
    assert wrong / runs > ALPHA / 4  # and it does not buy that by never saying anything


def test_a_suite_with_a_bias_below_the_margin_gives_no_alarm_at_any_look() -> None:
    random, wrong = Random(1), 0
    for _ in range(60):
        suite = {f"case {i}": noisy(random, 40, slower=random.uniform(0.985, 1.015)) for i in range(7)}
        looks = ({name: ratios[:n] for name, ratios in suite.items()} for n in range(1, 41))
        wrong += any(alarms(look).happened for look in looks)
    assert wrong <= 3  # 5% of 60


@pytest.mark.parametrize("slower, least", [(1.1, 0.95), (1.2, 0.99), (1 / 1.2, 0.99)])
def test_a_tenth_is_found_among_seven_cases_in_24_blocks(slower: float, least: float) -> None:
    random, hits, runs = Random(2), 0, 200
    for _ in range(runs):
        suite = {f"case {i}": noisy(random, 24) for i in range(6)}
        finding = decide({**suite, "slowed": noisy(random, 24, slower=slower)})["slowed"].finding
        hits += finding == ("slower" if slower > 1 else "faster")
    spread = 3 * math.sqrt(least * (1 - least) / runs)
    assert hits / runs >= least - spread


def test_what_is_the_same_is_soon_called_so() -> None:
    random = Random(3)
    verdicts = decide({f"case {i}": noisy(random, 30, spread=0.01) for i in range(7)})
    assert {verdict.finding for verdict in verdicts.values()} == {"same"}
    assert decided(verdicts)


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from("abcd"), MANY, min_size=1), st.randoms())
def test_the_order_of_blocks_says_nothing(cases: dict[str, list[float]], random: Random) -> None:
    shuffled = {name: random.sample(ratios, len(ratios)) for name, ratios in cases.items()}
    assert decide(shuffled) == decide(cases)


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from("abcd"), MANY, min_size=1))
def test_exchanging_base_and_head_mirrors_the_verdict(cases: dict[str, list[float]]) -> None:
    edges = (1 + MARGIN, 1 / (1 + MARGIN))
    kept = {
        name: [r for r in ratios if all(abs(r / edge - 1) > 1e-9 for edge in edges)] for name, ratios in cases.items()
    }
    there, back = decide(kept), decide({name: [1 / ratio for ratio in ratios] for name, ratios in kept.items()})
    for name, verdict in there.items():
        mirrored = back[name]
        assert mirrored.finding == OPPOSITE[verdict.finding]
        assert mirrored.p == pytest.approx(verdict.p)
        if verdict.interval is not None:
            low, high = verdict.interval
            assert mirrored.interval == pytest.approx((1 / high, 1 / low))


@settings(max_examples=50)
@given(st.lists(MANY, min_size=1, max_size=8))
def test_holm_steps_down_from_the_smallest_p(cases: list[list[float]]) -> None:
    named = {str(i): ratios for i, ratios in enumerate(cases)}
    p = {name: min(1.0, 2 / sum(slower_and_faster(ratios))) for name, ratios in named.items()}
    rejected: set[str] = set()
    for at, name in enumerate(sorted(p, key=p.__getitem__)):
        if p[name] > ALPHA / (len(p) - at):
            break
        rejected.add(name)
    assert {name for name, verdict in decide(named).items() if verdict.different} == rejected


@given(st.lists(RATIO, min_size=1, max_size=40), RATIO)
def test_the_interval_holds_what_neither_side_has_evidence_against(ratios: list[float], c: float) -> None:
    above = evidence(sum(ratio > c for ratio in ratios), len(ratios))
    below = evidence(sum(ratio < c for ratio in ratios), len(ratios))
    bounds = interval(ratios)
    inside = bounds is None or bounds[0] <= c <= bounds[1]
    assert inside == (max(above, below) < 20)


def test_the_interval_covers_the_median_at_all_looks_at_once() -> None:
    random, runs, missed = Random(4), 400, 0
    for _ in range(runs):
        ratios = [1.1 * random.lognormvariate(0.0, 0.04) for _ in range(40)]
        bounds = [interval(ratios[:n]) for n in range(1, 41)]
        missed += any(bound is not None and not bound[0] <= 1.1 <= bound[1] for bound in bounds)
    assert missed / runs <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / runs)


def test_same_means_that_both_ends_of_the_interval_lie_inside_the_margin() -> None:
    inside, across = [1.0 + 0.001 * i for i in range(-5, 6)], [1.0 + 0.01 * i for i in range(-5, 6)]
    above, below = [max(1.0, ratio) for ratio in across], [min(1.0, ratio) for ratio in across]
    verdicts = decide(
        {"inside": inside, "across": across, "above": above, "below": below, "few": inside[3:6], "none": []}
    )
    assert {name: verdict.finding for name, verdict in verdicts.items()} == {
        "inside": "same",
        "across": "not enough evidence",
        "above": "not enough evidence",
        "below": "not enough evidence",
        "few": "not enough evidence",
        "none": "not enough evidence",
    }
    assert verdicts["few"].interval is None
    assert verdicts["none"].ratio is None
    assert not decided(verdicts)


def test_a_difference_inside_the_margin_is_none_however_sure() -> None:
    assert decide({"case": [1.015] * 500})["case"].finding == "same"
    assert decide({"case": [1.025] * 500})["case"].finding == "slower"
    assert decide({"case": [1 / 1.015] * 500})["case"].finding == "same"
    assert decide({"case": [1 / 1.025] * 500})["case"].finding == "faster"


def test_nothing_to_decide_is_decided() -> None:
    assert decide({}) == {}
    assert decided({})


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_ratio_that_is_none_is_refused_by_the_name_of_its_case(bad: float) -> None:
    with pytest.raises(ValueError, match=r"decode=.*positive numbers"):
        decide({"decode": [1.0, bad]})


@pytest.mark.parametrize("happened, of", [(0, 300), (3, 7), (300, 300), (0, 1)])
def test_bounds_of_a_rate_are_those_of_scipy(happened: int, of: int) -> None:
    expected = stats.binomtest(happened, of).proportion_ci(0.95, method="exact")
    assert Rate(happened, of).bounds == pytest.approx((expected.low, expected.high))


def test_a_rate_is_printed_with_its_bounds() -> None:
    assert str(Rate(0, 300)) == "0 of 300 (95%: 0.0% to 1.2%)"
    assert str(Rate(0, 0)) == "0 of 0"


def test_slow_downs_are_found_one_at_a_time_among_the_control() -> None:
    control = {"a": [1.0] * 12, "b": [1.0] * 12}
    assert alarms(control) == Rate(0, 2)
    assert found(control, {"a": [1.1] * 12, "b": [1.01] * 12}) == Rate(1, 2)
    assert found(control, {"a": [0.9] * 12, "b": [1.0] * 12}) == Rate(0, 2), "faster is no slow-down found"
    assert alarms({"a": [1.1] * 12, "b": [0.9] * 12}) == Rate(2, 2)


@pytest.mark.parametrize("blocks, cases", [*product([4, 5, 9], [1, 7])])
def test_too_few_blocks_support_no_difference(blocks: int, cases: int) -> None:
    verdicts = decide({str(i): [1.5 if i == 0 else 1.0] * blocks for i in range(cases)})
    assert verdicts["0"].different == (2 / evidence(blocks, blocks) <= ALPHA / cases)


def test_of_five_cases_the_second_pays_for_four_and_the_third_for_three() -> None:
    """p before Holm is 0.006 after 9 of 9, 0.0115 after 8 of 8, 0.022 after 7 of 7; limits are 0.05 by 5, 4, 3."""
    cases = {str(won): [1.1] * won for won in (9, 8, 7)} | {"a": [1.0] * 9, "b": [1.0] * 9}
    assert [name for name, verdict in decide(cases).items() if verdict.different] == ["9", "8"]


def test_nine_blocks_of_nine_find_one_slow_case_of_eight() -> None:
    cases = {"slowed": [1.1] * 9} | {str(i): [1.0] * 9 for i in range(7)}
    assert decide(cases)["slowed"].finding == "slower"
    assert decide({name: ratios[:8] for name, ratios in cases.items()})["slowed"].finding == "not enough evidence"
