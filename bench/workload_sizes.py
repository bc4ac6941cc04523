"""At which sizes routing workloads are counted and their experts placed on ranks, apart from what does so, that a study
may say it without importing torch.

DeepSeek-V3 serves its 256 experts from 32 ranks with one redundant expert on each (arXiv:2412.19437 section 3.4.1);
the quick profile has a quarter of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from bench.record import Profile


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """So many experts on so many ranks, judged at so many steps."""

    experts: int
    ranks: int
    steps: int


TOKENS: Mapping[Profile, int] = {"quick": 2048, "full": 8192}  # of a step
CHOSEN = 8  # experts of a token
FACTOR = 1.2  # mean loads that an expert has room for, the article's
LAYERS = 8  # that are drawn together
PLACED: Mapping[Profile, Ranks] = {
    "quick": Ranks(experts=64, ranks=8, steps=12),
    "full": Ranks(experts=256, ranks=32, steps=32),
}
SMALL: Mapping[Profile, tuple[int, ...]] = {"quick": (10, 12), "full": (8, 10, 12)}  # experts: all placements are tried
PAST = 6  # steps that a placement knows; no period of a workload's: an enemy of past loads must find them uneven
SMALL_RANKS, SMALL_SLOTS = 4, 3  # slots of a rank: a dozen in all
