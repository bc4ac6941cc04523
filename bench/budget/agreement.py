"""The same question put to a trace and to real memory, as figures by the metrics of the arithmetic.

All look at a microbatch after the first, when gradients of an earlier one are there: the peak of a step with more than
one. `live_bytes` is the peak; of it alone the allocator knows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from bench.budget.allocator import allocated
from bench.budget.asked import Asked, replicas
from bench.budget.traced import trace, traceable
from bench.budget.traffic import ring_all_reduce


@dataclass(frozen=True, kw_only=True)
class Traced:
    """Figures of a device that trains alone and of one of several replicas: what a ring sends of what it hands over,
    and its peak. `at_peak` says of what kinds the bytes at the former's peak are.
    """

    device: Mapping[str, int]
    replica: Mapping[str, int]
    at_peak: Mapping[str, int]


def without_selection(asked: Asked) -> Asked:
    """The question about the same model with dense attention: what can be traced."""
    return replace(asked, config=traceable(asked.config))


def traced(asked: Asked) -> Traced:
    """Trace the step once, as one of several replicas."""
    ranks = replicas(asked).dp
    found = trace(
        asked.config,
        asked.recipe,
        sequences=asked.sequences,
        policy=asked.policy,
        replicas=ranks,
        accumulating=True,
    )
    device = {
        "parameters": found.parameters,
        "parameter_bytes": found.parameter_bytes,
        "gradient_bytes": found.gradient_bytes,
        "optimizer_bytes": found.optimizer_bytes,
        "saved_bytes": found.kept_bytes,
        "flops": found.flops,
        "live_bytes": found.peak,
    }
    replica = {"sent_bytes": ring_all_reduce(found.handed, ranks), "live_bytes": found.replica_peak}
    return Traced(device=device, replica=replica, at_peak=found.at_peak)


def real(asked: Asked) -> tuple[dict[str, int], Mapping[str, int]]:
    """The allocator's peak, and operators' scratch, largest first."""
    found = allocated(asked.config, asked.recipe, sequences=asked.sequences, policy=asked.policy, accumulating=True)
    return {"live_bytes": found.peak}, found.scratch
