"""What every schedule promises, for every schedule of the catalogue and a few shapes each."""

import pytest

from dsv3.pipeline import SCHEDULES, Schedule, Times, bubble, named, parse, peak_activations, simulate, validate
from dsv3.pipeline.validate import Send

SHAPES = [(2, 4), (2, 6), (4, 8), (4, 12), (6, 12), (8, 20), (8, 32)]
# Which kinds of send keep each schedule from standing still: a rank that must post a receive ahead needs a buffer.
SENDS = {
    "gpipe": ("buffered", "batched", "rendezvous"),
    "one_f_one_b": ("buffered", "batched"),
    "interleaved_one_f_one_b": ("buffered",),
    "zero_bubble_h1": ("buffered", "batched"),
    "dual_pipe": ("buffered",),
    "dual_pipe_v": ("buffered",),
}


def fits(schedule: Schedule, ranks: int, microbatches: int) -> bool:
    try:
        schedule.plan(ranks, microbatches)
    except ValueError:
        return False
    return True


CASES = [
    pytest.param(schedule, ranks, microbatches, id=f"{schedule.name}-{ranks}x{microbatches}")
    for schedule in SCHEDULES
    for ranks, microbatches in SHAPES
    if fits(schedule, ranks, microbatches)
]
cases = pytest.mark.parametrize("schedule, ranks, microbatches", CASES)


def test_every_schedule_has_at_least_five_shapes_here() -> None:
    for schedule in SCHEDULES:
        assert sum(fits(schedule, ranks, microbatches) for ranks, microbatches in SHAPES) >= 5, schedule.name


@cases
def test_a_plan_is_a_training_step(schedule: Schedule, ranks: int, microbatches: int) -> None:
    plan = schedule.plan(ranks, microbatches)
    validate(plan)
    assert (plan.ranks, plan.microbatches) == (ranks, microbatches)


@cases
def test_a_plan_survives_its_text_form(schedule: Schedule, ranks: int, microbatches: int) -> None:
    plan = schedule.plan(ranks, microbatches)
    assert parse(str(plan), name=plan.name) == plan


@cases
def test_the_simulator_meets_the_closed_form_of_idle_time(schedule: Schedule, ranks: int, microbatches: int) -> None:
    times = Times(f=1.5, b=1.5, w=0.75)
    found = bubble(simulate(schedule.plan(ranks, microbatches), times))
    # Sums of a few hundred halves and quarters are exact in binary.
    assert max(found.idle) == schedule.idle(ranks, microbatches, times)
    assert found.work == (microbatches * 3.75,) * ranks


@cases
def test_no_rank_holds_more_than_the_closed_form_and_one_holds_it(
    schedule: Schedule, ranks: int, microbatches: int
) -> None:
    peaks = peak_activations(simulate(schedule.plan(ranks, microbatches), Times()))
    assert max(peaks) == schedule.peak(ranks, microbatches)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)
@pytest.mark.parametrize("send", ["buffered", "batched", "rendezvous"])
def test_a_schedule_stands_still_exactly_under_the_sends_that_are_too_strict(schedule: Schedule, send: Send) -> None:
    plan = schedule.plan(4, 8)
    if send in SENDS[schedule.name]:
        validate(plan, send)
    else:
        with pytest.raises(ValueError, match=r"stands still: rank \d waits for .* rank \d"):
            validate(plan, send)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)
@pytest.mark.parametrize("ranks, microbatches, name", [(0, 4, "ranks"), (2, 0, "microbatches"), (2.0, 4, "ranks")])
def test_a_shape_that_is_none_is_refused_by_name(schedule: Schedule, ranks: int, microbatches: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}={microbatches if name == 'microbatches' else ranks}: must be "):
        schedule.plan(ranks, microbatches)


@pytest.mark.parametrize(
    "name, ranks, microbatches, message",
    [
        ("interleaved_one_f_one_b", 4, 9, r"microbatches=9: must be a multiple of its 2 rounds .*; use 8 or 12"),
        ("dual_pipe", 3, 8, r"ranks=3: must be even.*; use 4"),
        ("dual_pipe", 4, 6, r"microbatches=6: must be at least 2 x ranks=8.*; use 8 or more"),
        ("dual_pipe", 4, 9, r"microbatches=9: must be even.*; use 10"),
        ("dual_pipe_v", 4, 7, r"microbatches=7: must be at least 2 x ranks=8"),
    ],
)
def test_a_shape_that_does_not_suit_a_schedule_is_refused_with_the_nearest_that_does(
    name: str, ranks: int, microbatches: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        named(name).plan(ranks, microbatches)


def test_an_unknown_schedule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="schedule='zbv': must be one of gpipe, one_f_one_b"):
        named("zbv")
