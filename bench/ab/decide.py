"""Which of three verdicts the ratios of blocks support, at whatever moment one looks: different, same, not enough.

A block's ratio is time(head) / time(base). Its median theta is what is judged, by signs alone: whatever the noise is,
if theta <= c, a ratio exceeds c with probability 1/2 at most, whatever came before. Betting on "exceeds" as fits a
probability q of winning multiplies the capital by 2q or by 2(1 - q). Averaged over q from 1/2 to 1 by a weight w, after
k of n bets won,

    E(k, n) = integral of w(q) (2q)^k (2(1 - q))^(n-k) dq,      w(q) ~ q^16,      P(ever E >= 1/a) <= a

(Ville 1939; Robbins 1970, "Statistical methods related to the law of the iterated logarithm"). So one may look after
every block and stop when it pleases. Any weight keeps this promise; large q weigh more, because a slow-down worth
finding makes nearly all blocks exceed the margin, and 9 of 9 must do for one of eight cases. With the margin m = 2%:

    different   (E against theta <= 1+m, plus E against theta >= 1/(1+m)) / 2 is large: p = 1/E, Holm over the cases
                at 5%. A bias below the margin, such as one place in the order has, is no difference
    same        the 90% interval, every c against which neither side has E >= 20, lies inside the margin

Neither depends on the order of the blocks or on units of time. Exchanging base and head mirrors them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Literal

from scipy.special import betaincc, betaln
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from dsv3.config.rules import require

MARGIN = 0.02
ALPHA = 0.05  # that any case of a run is called different that is not
INTERVAL = 0.90
WEIGHT = 16  # the exponent of w

Finding = Literal["slower", "faster", "same", "not enough evidence"]
Ratios = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Verdict:
    """What is known of one case: slower and faster are "different".

    ratio      the median of the blocks, None without any
    interval   of the median, valid at every look at once; None while there are too few blocks for one
    p          of "different", adjusted for the number of cases
    """

    finding: Finding
    ratio: float | None
    interval: tuple[float, float] | None
    p: float
    blocks: int

    @property
    def different(self) -> bool:
        """Whether the case costs more, or less, than the margin allows."""
        return self.finding in ("slower", "faster")


@cache
def evidence(won: int, bets: int) -> float:
    """E(won, bets): how many times over the capital has grown; at least 20 happens to one in 20 who bet on nothing."""
    weight = _upper_half(WEIGHT + 1, 1)
    logarithm = bets * math.log(2) + _upper_half(won + WEIGHT + 1, bets - won + 1) - weight
    return math.exp(min(logarithm, 700.0))  # e^700: about the most that a float holds


def _upper_half(a: int, b: int) -> float:
    """The logarithm of the integral of q^(a-1) (1-q)^(b-1) from 1/2 to 1."""
    share = float(betaincc(a, b, 0.5))
    return float(betaln(a, b)) + math.log(share) if share else -math.inf  # a capital too small for a float is none


def slower_and_faster(ratios: Sequence[float]) -> tuple[float, float]:
    """The evidence that the median lies above the margin, and that it lies below."""
    above = sum(ratio > 1 + MARGIN for ratio in ratios)
    below = sum(ratio < 1 / (1 + MARGIN) for ratio in ratios)
    return evidence(above, len(ratios)), evidence(below, len(ratios))


def interval(ratios: Sequence[float], *, level: float = INTERVAL) -> tuple[float, float] | None:
    """The medians that the blocks do not speak against, or None where they cannot yet speak against any."""
    blocks = len(ratios)
    enough = 2 / (1 - level)  # each side has half of what may go wrong
    needed = next((won for won in range(blocks + 1) if evidence(won, blocks) >= enough), None)
    if needed is None:
        return None
    ordered = sorted(ratios)
    return ordered[blocks - needed], ordered[needed - 1]


def decide(cases: Ratios) -> dict[str, Verdict]:
    """The verdict on each case from its blocks' ratios so far.

    Raises:
        ValueError: a ratio that is not a positive number.
    """
    if not cases:
        return {}
    for name, ratios in cases.items():
        fine = all(0 < ratio < math.inf for ratio in ratios)
        require(fine, name, list(ratios), "ratios must be positive numbers", "look at the recorded seconds")
    both = {name: slower_and_faster(ratios) for name, ratios in cases.items()}
    raw = [min(1.0, 2 / sum(pair)) for pair in both.values()]
    rejected, adjusted, *_ = multipletests(raw, alpha=ALPHA, method="holm")
    return {
        name: _verdict(cases[name], both[name], bool(reject), float(p))
        for name, reject, p in zip(cases, rejected, adjusted, strict=True)
    }


def _verdict(ratios: Sequence[float], both: tuple[float, float], different: bool, p: float) -> Verdict:
    bounds = interval(ratios)
    finding: Finding = "not enough evidence"
    if different:
        finding = "slower" if both[0] > both[1] else "faster"
    elif bounds and bounds[0] > 1 / (1 + MARGIN) and bounds[1] < 1 + MARGIN:
        finding = "same"
    return Verdict(finding, median(ratios) if ratios else None, bounds, p, len(ratios))


def decided(verdicts: Mapping[str, Verdict]) -> bool:
    """Whether more blocks could be spared: every case is different or the same."""
    return all(verdict.finding != "not enough evidence" for verdict in verdicts.values())


@dataclass(frozen=True)
class Rate:
    """How often something happened, `happened` times of `of`."""

    happened: int
    of: int

    @property
    def bounds(self) -> tuple[float, float]:
        """The 95% interval of the probability (Clopper and Pearson 1934), which covers at least as often as it says."""
        low, high = proportion_confint(self.happened, self.of, alpha=0.05, method="beta")
        return float(low), float(high)

    def __str__(self) -> str:
        if self.of == 0:
            return "0 of 0"
        low, high = self.bounds
        return f"{self.happened} of {self.of} (95%: {low:.1%} to {high:.1%})"


def alarms(control: Ratios) -> Rate:
    """How many cases of a control, which is the base against itself, are called different."""
    return Rate(sum(verdict.different for verdict in decide(control).values()), len(control))


def found(control: Ratios, slowed: Ratios) -> Rate:
    """How many slow-downs are found, each alone among cases that did not change: the hardest place for Holm."""
    hits = sum(decide({**control, name: slowed[name]})[name].finding == "slower" for name in control)
    return Rate(hits, len(control))
