"""The same question put to a trace and to real memory, as figures by the metrics of the arithmetic.

All look at a microbatch after the first, when gradients of an earlier one are there: the peak of a step with more than
one. `live_bytes` is the peak; of it alone the allocator knows.
"""

from collections.abc import Mapping
from dataclasses import replace

from bench.budget.allocator import allocated
from bench.budget.asked import Asked
from bench.budget.traced import trace, traceable


def without_selection(asked: Asked) -> Asked:
    """The question about the same model with dense attention: what can be traced."""
    return replace(asked, config=traceable(asked.config))


def traced(asked: Asked) -> dict[str, int]:
    """What the trace found."""
    found = trace(asked.config, asked.recipe, sequences=asked.sequences, policy=asked.policy, accumulating=True)
    return {
        "parameters": found.parameters,
        "parameter_bytes": found.parameter_bytes,
        "gradient_bytes": found.gradient_bytes,
        "optimizer_bytes": found.optimizer_bytes,
        "saved_bytes": found.kept_bytes,
        "flops": found.flops,
        "live_bytes": found.peak,
    }


def real(asked: Asked) -> tuple[dict[str, int], Mapping[str, int]]:
    """The allocator's peak, and operators' scratch, largest first."""
    found = allocated(asked.config, asked.recipe, sequences=asked.sequences, policy=asked.policy, accumulating=True)
    return {"live_bytes": found.peak}, found.scratch
