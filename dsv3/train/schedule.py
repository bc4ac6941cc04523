"""The learning rate as a share of its peak: up, flat, down.

    step s = 1, 2, ...      linear over the first `warmup` of the steps, so that step 1 already moves
                            1 until the last `decay` of the steps
                            final + (1 - final) (1 + cos(pi x)) / 2,   x from 0 to 1 at the last step

DeepSeek-V3 has this shape (arXiv 2412.19437 section 4.2) with phases in steps and tokens; here they are shares of the
run, so that a short run has all of them.
"""

import math

from dsv3.config import Schedule


def share_of_peak(schedule: Schedule, step: int, steps: int) -> float:
    """The multiplier of the peak learning rate at `step` of 1 ... `steps`; `final` beyond."""
    assert step >= 1, f"steps are counted from 1, this is {step}"
    warmup, decay = round(schedule.warmup * steps), round(schedule.decay * steps)
    if step <= warmup:
        return step / warmup
    if step <= steps - decay:
        return 1.0
    progress = min(1.0, (step - (steps - decay)) / max(decay, 1))
    return schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * progress)) / 2
