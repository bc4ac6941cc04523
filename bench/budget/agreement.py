"""The same question put to a trace and to real memory, as figures by the metrics of the arithmetic.

All look at a microbatch after the first, when gradients of an earlier one are there: the peak of a step with more than
one. `live_bytes` is the peak; of it alone the allocator knows.
"""

from collections.abc import Mapping
from dataclasses import replace

from bench.budget.allocator import allocated
from bench.budget.asked import Asked, replicas
from bench.budget.traced import trace, traceable
from bench.budget.traffic import ring_all_reduce


def without_selection(asked: Asked) -> Asked:
    """The question about the same model with dense attention: what can be traced."""
    return replace(asked, config=traceable(asked.config))


def traced(asked: Asked) -> tuple[dict[str, int], Mapping[str, int]]:
    """What the trace found, and of what kinds the bytes at its peak are."""
    found = trace(asked.config, asked.recipe, sequences=asked.sequences, policy=asked.policy, accumulating=True)
    figures = {
        "parameters": found.parameters,
        "parameter_bytes": found.parameter_bytes,
        "gradient_bytes": found.gradient_bytes,
        "optimizer_bytes": found.optimizer_bytes,
        "saved_bytes": found.kept_bytes,
        "flops": found.flops,
        "live_bytes": found.peak,
    }
    return figures, found.at_peak


def traced_replica(asked: Asked) -> dict[str, int]:
    """The same step as one of several replicas: what a ring sends of what it hands over, and its peak."""
    ranks = replicas(asked).dp
    found = trace(
        asked.config,
        asked.recipe,
        sequences=asked.sequences,
        policy=asked.policy,
        replicas=ranks,
        accumulating=True,
    )
    return {"sent_bytes": ring_all_reduce(found.handed, ranks), "live_bytes": found.peak}


def real(asked: Asked) -> tuple[dict[str, int], Mapping[str, int]]:
    """The allocator's peak, and operators' scratch, largest first."""
    found = allocated(asked.config, asked.recipe, sequences=asked.sequences, policy=asked.policy, accumulating=True)
    return {"live_bytes": found.peak}, found.scratch
