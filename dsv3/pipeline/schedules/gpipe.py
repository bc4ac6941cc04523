"""GPipe: every forward, then every backward (Huang et al. 2019, arXiv 1811.06965, section 2.3).

idle per rank = (p - 1)(f + b + w)      activations = m microbatches on every rank
"""

from dsv3.pipeline.plan import Action, Plan, check_counts


def gpipe(ranks: int, microbatches: int) -> Plan:
    """A fill and a drain over `ranks` stages of one rank each.

    Raises:
        ValueError: for fewer than one rank or microbatch.
    """
    check_counts(ranks=ranks, microbatches=microbatches)
    rows = tuple(
        tuple(Action(rank, kind, m) for kind in ("F", "B") for m in range(microbatches)) for rank in range(ranks)
    )
    return Plan("GPipe", microbatches, tuple((rank,) for rank in range(ranks)), rows)
