"""In which order the steps of a plan can happen, or where it stands still.

A rank takes its steps in order, each as soon as everything it needs is finished somewhere. That is a plan under
buffered sends: a message leaves at once and waits for its reader. `validate` also asks for stricter kinds of send.
"""

from collections.abc import Iterator

from dsv3.pipeline.plan import Plan, Result, Step


def run_order(plan: Plan) -> Iterator[tuple[int, Step]]:
    """Every (rank, step) after all that it needs, each rank in its own order.

    Raises:
        ValueError: when ranks are left that wait for something that never comes; names each and what it lacks.
    """
    finished: set[Result] = set()
    stages, place = plan.stages, [0] * plan.ranks
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(plan.rows):
            while place[rank] < len(row) and not missing(row[place[rank]], stages, finished):
                step = row[place[rank]]
                finished.update(result for action in step.actions for result in action.results)
                place[rank] += 1
                moved = True
                yield rank, step
    stuck = [(rank, row[place[rank]]) for rank, row in enumerate(plan.rows) if place[rank] < len(row)]
    if stuck:
        waits = "; ".join(f"rank {r} at {s} waits for {_words(missing(s, stages, finished))}" for r, s in stuck)
        raise ValueError(f"plan={plan.name!r}: deadlock, {waits}; put each action after what it needs")


def missing(step: Step, stages: int, finished: set[Result]) -> list[Result]:
    """What a step still waits for."""
    return [need for action in step.actions for need in action.needs(stages) if need not in finished]


def _words(results: list[Result]) -> str:
    return ", ".join(f"{stage}{kind}{microbatch}" for stage, kind, microbatch in results)
