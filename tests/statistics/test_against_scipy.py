"""Each statistic against another way to compute it: brute force over every case, or another function of scipy and
statsmodels on the same data.
"""

import math
from fractions import Fraction
from itertools import chain, combinations, product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.weightstats import DescrStatsW

from ablations.evidence import compare, mean, seeds_needed, sign_flip
from ablations.significance import flips_decide, holm_adjusted, sign_flip_interval
from bench.interval import of_median
from tests.statistics.draws import record

WHOLE = st.integers(-1000, 1000)
TENTHS = WHOLE.map(lambda n: Fraction(n, 10))  # no float holds a tenth: sums of them are where rounding would show


def flip_p(differences: list[Fraction]) -> Fraction:
    """Two-sided p of the sign-flip test over every way to sign the differences, in exact arithmetic."""
    total = sum(differences)
    sums = [
        sum(sign * d for sign, d in zip(signs, differences, strict=True))
        for signs in product((1, -1), repeat=len(differences))
    ]
    beyond = min(sum(one >= total for one in sums), sum(one <= total for one in sums))
    return min(Fraction(1), Fraction(2 * beyond, len(sums)))


@given(st.lists(TENTHS, min_size=1, max_size=8))
@example([Fraction(0), Fraction(-32), Fraction(1, 5), Fraction(319, 10)])  # large differences that cancel
def test_the_sign_flip_test_is_that_of_every_way_to_sign_in_exact_arithmetic(differences: list[Fraction]) -> None:
    assert sign_flip([float(d) for d in differences]) == pytest.approx(float(flip_p(differences)), rel=1e-12)


@given(st.permutations(range(1, 9)), st.lists(st.sampled_from((-1, 1)), min_size=8, max_size=8))
def test_on_ranks_the_sign_flip_test_is_wilcoxons(ranks: list[int], signs: list[int]) -> None:
    signed = [float(rank * sign) for rank, sign in zip(ranks, signs, strict=True)]
    assert sign_flip(signed) == pytest.approx(stats.wilcoxon(signed, method="exact").pvalue, rel=1e-12)


@settings(max_examples=30)
@given(st.lists(TENTHS, min_size=6, max_size=8), TENTHS)
def test_the_inverted_test_lets_stand_what_the_test_lets_stand(differences: list[Fraction], value: Fraction) -> None:
    low, high = sign_flip_interval([float(d) for d in differences]) or (math.nan, math.nan)
    assert len(differences) >= 6
    if min(abs(float(value) - low), abs(float(value) - high)) > 1e-9:  # on an end, rounding decides
        assert (low < float(value) < high) == (flip_p([d - value for d in differences]) > Fraction(1, 20))


@given(st.lists(st.integers(1, 50), min_size=6, max_size=14), st.integers(1, 50))
def test_the_interval_of_a_median_lets_stand_what_the_sign_test_lets_stand(samples: list[int], value: int) -> None:
    low, high = of_median([float(sample) for sample in samples]) or (0.0, 0.0)
    n = len(samples)
    ends = [sum(sample < value for sample in samples), sum(sample > value for sample in samples)]
    # Samples that equal the value may count on either side: it is outside only where no count lets it stand.
    stands = all(stats.binomtest(end, n, alternative="greater").pvalue > 0.025 for end in ends)
    assert (low <= value <= high) == stands


@pytest.mark.parametrize("level", [0.5, 0.75, 0.95, 0.999])
@pytest.mark.parametrize("n", [2, 5, 6, 7, 11, 12, 48, 1100])
def test_the_interval_of_a_median_is_scipys(n: int, level: float) -> None:
    samples = np.random.default_rng(n).lognormal(size=n).tolist()
    middle, logarithms = float(np.median(samples)), np.log(samples)
    wanted = stats.quantile_test(samples, q=middle, p=0.5).confidence_interval(level)
    if math.isnan(wanted.low):  # too few: Student's, with the median in it
        student = stats.t.interval(level, n - 1, logarithms.mean(), stats.sem(logarithms))
        wanted = (min(math.exp(student[0]), middle), max(math.exp(student[1]), middle))
    assert of_median(samples, level=level) == pytest.approx(tuple(wanted), rel=1e-12)


@pytest.mark.parametrize("freedom", [*range(1, 20)])
def test_students_quantile_leaves_a_fortieth_of_its_density_above(freedom: int) -> None:
    """The interval of n samples 0, .., 0, 1 gives t away; the density is integrated by hand."""
    n = freedom + 1
    found = mean([0.0] * freedom + [1.0])
    assert found.high is not None
    quantile = (found.high - 1 / n) / (math.sqrt((1 - 1 / n) / freedom) / math.sqrt(n))
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    angles = np.linspace(0, math.atan(quantile / math.sqrt(freedom)), 20_001)  # t = sqrt(freedom) tan(angle)
    inside = 2 * scale * math.sqrt(freedom) * np.trapezoid(np.cos(angles) ** (freedom - 1), angles)
    assert inside == pytest.approx(0.95, abs=1e-7)


@given(st.lists(WHOLE.map(float), min_size=2, max_size=9, unique=True))
def test_a_mean_is_that_of_statsmodels(values: list[float]) -> None:
    found = mean(values)
    assert (found.low, found.high) == pytest.approx(DescrStatsW(values).tconfint_mean(0.05), abs=1e-6)


@given(st.lists(st.tuples(WHOLE, WHOLE), min_size=3, max_size=7, unique_by=lambda pair: pair[0] - pair[1]))
def test_a_paired_difference_is_scipys_paired_t(pairs: list[tuple[int, int]]) -> None:
    rows = [
        record(float(v), arm=arm, seed=s) for s, pair in enumerate(pairs) for arm, v in zip("ab", pair, strict=True)
    ]
    found = compare(rows, arm="a", baseline="b", metric="loss_gap")
    ours, theirs = zip(*pairs, strict=True)
    wanted = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-6)


@given(st.lists(st.floats(0.125, 8), min_size=3, max_size=7, unique=True))
def test_a_geometric_mean_is_scipys(ratios: list[float]) -> None:
    found = mean(ratios, geometric=True)
    wanted = stats.ttest_1samp(np.log(ratios), 0).confidence_interval(0.95)
    assert found.value == pytest.approx(stats.gmean(ratios))
    assert (found.low, found.high) == pytest.approx((math.exp(wanted.low), math.exp(wanted.high)), rel=1e-6)


@settings(max_examples=8)  # statsmodels collects garbage on each
@given(st.lists(st.floats(0, 0.2), min_size=1, max_size=6))
def test_holm_rejects_what_every_family_that_holds_it_rejects(p_values: list[float]) -> None:
    """Closed testing (Marcus, Peritz, Gabriel 1976): each family of nulls by Bonferroni."""
    every = range(len(p_values))
    families = [set(f) for f in chain.from_iterable(combinations(every, size) for size in range(1, len(p_values) + 1))]

    def rejected(at: int) -> bool:
        return all(min(p_values[i] for i in family) <= 0.05 / len(family) for family in families if at in family)

    adjusted = holm_adjusted({str(at): p for at, p in enumerate(p_values)})
    for at in every:
        if abs(adjusted[str(at)] - 0.05) > 1e-12:
            assert (adjusted[str(at)] <= 0.05) == rejected(at)


@pytest.mark.parametrize("comparisons", [1, 2, 3, 9, 50])
def test_the_seeds_that_are_said_to_be_needed_suffice_and_one_fewer_does_not(comparisons: int) -> None:
    seeds = seeds_needed(comparisons)
    for n, enough in ((seeds, True), (seeds - 1, False)):
        least = sign_flip([1.0 + seed for seed in range(n)])
        assert least == 2 / 2**n
        others = dict.fromkeys(map(str, range(comparisons - 1)), 1.0)
        assert (holm_adjusted({"best": least} | others)["best"] <= 0.05) is enough
        assert flips_decide(comparisons, n) is enough
