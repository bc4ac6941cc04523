"""What every policy of a capacity keeps, in lists and loops: the slow truth that the room is tested against."""

from dsv3.config import MoE
from dsv3.moe import Routing

Pairs = set[tuple[int, int]]


def kept_pairs(routing: Routing) -> Pairs:
    """The (token, expert) pairs that a routing really has."""
    assert routing.kept is not None, "a capacity was applied"
    return {
        (token, expert)
        for token, (experts, kept) in enumerate(zip(routing.indices.tolist(), routing.kept.tolist(), strict=True))
        for expert, there in zip(experts, kept, strict=True)
        if there
    }


def by_position(routing: Routing, most: int) -> Pairs:
    """Every expert takes tokens in the order of the batch until it is full."""
    taken: Pairs = set()
    for token, experts in enumerate(routing.indices.tolist()):
        for expert in experts:
            if load(taken, expert) < most:
                taken.add((token, expert))
    return taken


def by_probability(routing: Routing, most: int) -> Pairs:
    """Every expert takes the tokens with the largest gate weights, the first of equals."""
    taken: Pairs = set()
    for expert in range(len(routing.counts)):
        wanting = [
            (-weight, token)
            for token, row in enumerate(zip(routing.indices.tolist(), routing.weights.tolist(), strict=True))
            for chosen, weight in zip(*row, strict=True)
            if chosen == expert
        ]
        taken |= {(token, expert) for _, token in sorted(wanting)[:most]}
    return taken


def by_reroute(routing: Routing, moe: MoE, most: int, biased: list[list[float]]) -> Pairs:
    """By probability; then rounds in which tokens ask the next best experts and experts take who scores them most.

    `biased` has a token's scores with the bias, -inf at experts that it cannot have.
    """
    scores, experts, taken = routing.scores.tolist(), range(len(routing.counts)), by_probability(routing, most)
    while True:
        asking: dict[int, list[tuple[float, int]]] = {expert: [] for expert in experts}
        for token, row in enumerate(biased):
            lacking = moe.num_experts_per_tok - sum(pair[0] == token for pair in taken)
            open_ = [e for e in experts if (token, e) not in taken and load(taken, e) < most and row[e] > float("-inf")]
            for expert in sorted(open_, key=lambda e: (-row[e], e))[:lacking]:
                asking[expert].append((-scores[token][expert], token))
        if not any(asking.values()):
            return taken
        room = {expert: most - load(taken, expert) for expert in experts}
        taken |= {(token, expert) for expert, asks in asking.items() for _, token in sorted(asks)[: room[expert]]}


def load(taken: Pairs, expert: int) -> int:
    """How many tokens an expert has."""
    return sum(pair[1] == expert for pair in taken)
