"""Closed forms for what a schedule leaves idle and keeps in memory; `simulate` equals each inside its domain.

With f, b, w the time per microbatch and device of the forward, input gradient and weight gradient, p ranks, m
microbatches, v stages per rank, and T = f + b + w (so that the work of a rank is m T):

    schedule            idle per rank                       peak activations           source
    GPipe               (p-1) T                             m                          arXiv 1811.06965, 2.3
    1F1B                (p-1) T                             min(m, p - r)              arXiv 2104.04473, 2.2.1
    interleaved 1F1B    (p-1) T / v                         p + (p-1) / v              arXiv 2104.04473, 2.2.2
    ZB-H1               (p-1) (f + b - w)                   min(m, p)                  arXiv 2401.10241, 2.3
    DualPipe            (p/2-1) (F&B + B - 3W)              p + 1                      deepseek-ai/DualPipe, README
    DualPipeV           (p-1) (F&B + B - 3W) / 2            p + 1/2                    the same, 2p stages

DeepSeek writes B for the whole backward b + w, W = w, and F&B for an overlapped pair.

Two of them are narrower in their sources than they look. ZB-H1's is exact while w <= min(f, b) and m >= p; the form
here, (p-1)(f + b) - (min(m, p) - 1) min(f, b, w), equals it there and stays exact outside. DualPipe's is exact, for the
rank that idles most, while f = b >= w and max(f, b + w) <= F&B <= T: outside, `dual_pipe_idle` refuses.
"""

from dsv3.config.rules import require
from dsv3.pipeline.simulate import Times


def flush_idle(ranks: int, times: Times) -> float:
    """Idle time of a rank under GPipe or 1F1B: a fill and a drain."""
    return (ranks - 1) * (times.f + times.b + times.w)


def interleaved_idle(ranks: int, microbatches: int, times: Times, chunks: int) -> float:
    """Idle time of a rank under interleaved 1F1B with `chunks` stages per rank.

    Raises:
        ValueError: for fewer microbatches than ranks.
    """
    _check_filled(ranks, microbatches)
    return flush_idle(ranks, times) / chunks


def zero_bubble_h1_idle(ranks: int, microbatches: int, times: Times, chunks: int = 1) -> float:
    """Idle time of a rank under ZB-H1, for all f, b and w.

    Raises:
        ValueError: for fewer microbatches than ranks where `chunks` > 1.
    """
    if chunks > 1:
        _check_filled(ranks, microbatches)
    filled = min(microbatches, ranks) - 1
    return ((ranks - 1) * (times.f + times.b) - filled * min(times.f, times.b, times.w)) / chunks


def _check_filled(ranks: int, microbatches: int) -> None:
    rule = f"the closed form over chunks needs at least one per rank, {ranks}"
    require(microbatches >= ranks, "microbatches", microbatches, rule, "simulate the plan instead")


def dual_pipe_exact(times: Times) -> bool:
    """Whether DeepSeek's formula describes these times exactly."""
    pair, whole = paired(times), times.f + times.b + times.w
    return times.f == times.b >= times.w and max(times.f, times.b + times.w) <= pair <= whole


def dual_pipe_idle(ranks: int, times: Times) -> float:
    """Idle time of the rank that idles most under bidirectional DualPipe over `ranks` devices.

    Raises:
        ValueError: for times outside the formula's domain.
    """
    rule = "DualPipe's formula is exact only for f = b >= w and max(f, b + w) <= pair <= f + b + w"
    require(dual_pipe_exact(times), "times", times, rule, "simulate the plan instead")
    return (ranks / 2 - 1) * (paired(times) + times.b + times.w - 3 * times.w)


def dual_pipe_v_idle(ranks: int, times: Times) -> float:
    """The same for DualPipeV over `ranks` devices, each with two stages of half the size.

    Raises:
        ValueError: for times outside the formula's domain.
    """
    return dual_pipe_idle(2 * ranks, times) / 2


def paired(times: Times) -> float:
    """Time of an overlapped forward and backward."""
    return times.f + times.b + times.w if times.pair is None else times.pair


def interleaved_peak(ranks: int, microbatches: int, chunks: int) -> float:
    """Microbatches that the first rank holds at most under interleaved 1F1B; p + (p-1)/v for m a multiple of p."""
    per_round = microbatches // max(1, microbatches // ranks)
    return min(microbatches * chunks, (chunks - 1) * per_round + 2 * ranks - 1) / chunks


def idle_to_ideal(idle: float, microbatches: int, times: Times) -> float:
    """Idle time as a multiple of a rank's work, the definition papers use: (p-1)/m for 1F1B."""
    return idle / (microbatches * (times.f + times.b + times.w))


def idle_share(idle: float, microbatches: int, times: Times) -> float:
    """Idle time as a share of the makespan, the definition profilers use: (p-1)/(m+p-1) for 1F1B."""
    return idle / (microbatches * (times.f + times.b + times.w) + idle)
