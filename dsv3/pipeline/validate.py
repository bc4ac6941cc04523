"""Is this plan a training step? Each microbatch passes each stage once, in order, and no rank waits for ever.

Whether ranks wait for ever depends on how messages are sent, so the kind of send is an argument:

    buffered     a send returns at once and the message waits for its reader (gloo's isend, a simulator)
    batched      the sends of a step and the receives of the next are posted as one group, and the rank goes on when all
                 of them have met their partner (Megatron's send_forward_recv_backward, torch's batch_isend_irecv)
    rendezvous   one after the other: receive, compute, send, and a send returns when its reader receives (MPI_Ssend)

Each is stricter than the one before. 1F1B stands still under rendezvous, because neighbours send to each other at once,
each before it would receive. Interleaved 1F1B and DualPipe stand still when batched, too: there a rank must post a
receive before the step ahead of it, as their runtimes do. Messages are matched by name, as if each carried its tag.
"""

from itertools import product
from typing import Literal, get_args

from dsv3.config.rules import require
from dsv3.pipeline.order import run_order
from dsv3.pipeline.plan import Plan, Result, Step

Send = Literal["buffered", "batched", "rendezvous"]
Message = tuple[Result, int, int]  # what, from which rank, to which rank


def validate(plan: Plan, send: Send = "buffered") -> None:
    """Check a plan; silence means that it is one.

    Raises:
        ValueError: names the first violation: an action on the wrong rank, twice, or missing; a microbatch whose stage
            is split over two ranks; an action before what it needs; ranks that wait for each other under `send`.
    """
    require(send in get_args(Send), "send", send, f"must be one of {', '.join(get_args(Send))}", "pick one of these")
    _check_ranges(plan)
    home = _check_once(plan)
    _check_rows(plan)
    for _ in run_order(plan):
        pass
    if send != "buffered":
        _check_meetings(plan, _stations(plan, home, send), send)


def _check_ranges(plan: Plan) -> None:
    for rank, step in plan.steps():
        for action in step.actions:
            held = plan.placement[rank]
            rule = f"is on rank {rank}, which holds stages {', '.join(map(str, held))}"
            require(action.stage in held, "action", str(action), rule, "move it to a rank that holds its stage")
            rule = f"is on rank {rank}, and the plan has {plan.microbatches} microbatches"
            require(action.microbatch < plan.microbatches, "action", str(action), rule, "raise microbatches or drop it")


def _check_once(plan: Plan) -> dict[Result, int]:
    """Where each result comes from: every one exactly once, and those of one stage and microbatch on one rank."""
    home: dict[Result, int] = {}
    for rank, step in plan.steps():
        for action in step.actions:
            for result in action.results:
                rule = f"is the second {result[1]} of stage {result[0]} and microbatch {result[2]}"
                require(result not in home, "action", str(action), f"{rule}, on rank {rank}", "run it once")
                home[result] = rank
    for stage, microbatch in product(range(plan.stages), range(plan.microbatches)):
        wanted: tuple[Result, ...] = ((stage, "F", microbatch), (stage, "I", microbatch), (stage, "W", microbatch))
        for result in wanted:
            name = f"{stage}{result[1]}{microbatch}"
            require(result in home, "action", name, "is nowhere in the plan", "add it, or a B that contains it")
            rule = f"is on rank {home[result]}, but its forward is on rank {home[wanted[0]]}"
            require(home[result] == home[wanted[0]], "action", name, rule, "keep a microbatch's stage on one rank")
    return home


def _check_rows(plan: Plan) -> None:
    stages = plan.stages
    for rank, row in enumerate(plan.rows):
        finished: set[Result] = set()
        for step in row:
            for action in step.actions:
                own = [need for need in action.needs(stages) if need[0] == action.stage]
                late = [f"{stage}{kind}{m}" for stage, kind, m in own if (stage, kind, m) not in finished]
                rule = f"comes before {', '.join(late)} on rank {rank}"
                require(not late, "action", str(action), rule, "run F, then I, then W of a microbatch")
            finished.update(result for action in step.actions for result in action.results)


def _stations(plan: Plan, home: dict[Result, int], send: Send) -> list[list[set[Message]]]:
    """For each rank, the groups of messages at which it waits, in order."""
    receives = [[_incoming(plan, home, rank, step) for step in row] for rank, row in enumerate(plan.rows)]
    readers: dict[Result, Message] = {message[0]: message for row in receives for group in row for message in group}
    stations = []
    for row, arrivals in zip(plan.rows, receives, strict=True):
        sends = [
            {readers[result] for action in step.actions for result in action.results if result in readers}
            for step in row
        ]
        if send == "batched":
            stations.append([arrivals[0], *(s | r for s, r in zip(sends, [*arrivals[1:], set()], strict=True))])
        else:
            stations.append([group for pair in zip(arrivals, sends, strict=True) for group in pair])
    return stations


def _incoming(plan: Plan, home: dict[Result, int], rank: int, step: Step) -> set[Message]:
    needs = [need for action in step.actions for need in action.needs(plan.stages)]
    return {(need, home[need], rank) for need in needs if home[need] != rank}


def _check_meetings(plan: Plan, stations: list[list[set[Message]]], send: Send) -> None:
    """Move every rank past each station whose messages are all posted at both ends, until none moves."""
    place = [0] * plan.ranks
    posted: set[tuple[Message, int]] = set()  # (message, the rank that has come to it); a rank never leaves one unmet

    def post(rank: int) -> None:
        here = stations[rank][place[rank]] if place[rank] < len(stations[rank]) else set()
        posted.update((message, rank) for message in here)

    for rank in range(plan.ranks):
        post(rank)
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(stations):
            while place[rank] < len(row) and all((m, end) in posted for m in row[place[rank]] for end in m[1:]):
                place[rank] += 1
                post(rank)
                moved = True
    stuck = [rank for rank, row in enumerate(stations) if place[rank] < len(row)]
    waits = "; ".join(f"rank {rank} waits for {_words(stations[rank][place[rank]], rank)}" for rank in stuck)
    remedy = "post sends and receives together (batched), or buffer the sends"
    require(not stuck, "send", send, f"plan {plan.name!r} stands still: {waits}", remedy)


def _words(messages: set[Message], rank: int) -> str:
    return ", ".join(
        f"{stage}{kind}{m} {f'to rank {target}' if source == rank else f'from rank {source}'}"
        for (stage, kind, m), source, target in sorted(messages)
    )
