"""What holds for all shapes and times, among it that the simulator equals every closed form in its domain."""

from collections.abc import Callable
from itertools import pairwise, permutations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsv3.pipeline import (
    SCHEDULES,
    Plan,
    Schedule,
    Times,
    bubble,
    dual_pipe,
    dual_pipe_v,
    gpipe,
    interleaved_one_f_one_b,
    one_f_one_b,
    peak_activations,
    simulate,
    steady_period,
    validate,
    zero_bubble_h1,
)
from dsv3.pipeline.formulas import (
    dual_pipe_exact,
    dual_pipe_idle,
    dual_pipe_v_idle,
    flush_idle,
    idle_share,
    idle_to_ideal,
    interleaved_idle,
    interleaved_peak,
    zero_bubble_h1_idle,
)
from dsv3.pipeline.validate import Send

# A makespan sums at most about 400 durations: 1e-9 of it leaves a thousandfold room over rounding in float64.
CLOSE = 1e-9

part = st.floats(0.1, 3.0)
any_times = st.builds(lambda f, b, w: Times(f=f, b=b, w=w), part, part, part)
ranks_of = st.integers(2, 16)
few = settings(max_examples=40)


@st.composite
def paired_times(draw: st.DrawFn) -> Times:
    """The domain of DualPipe's formula: f = b >= w, and a pair between its longer half and both in turn."""
    f = draw(part)
    w = f * draw(st.floats(0.0, 1.0))
    least, most = f + w, f + f + w
    return Times(f=f, b=f, w=w, pair=min(most, least + draw(st.floats(0.0, 1.0)) * (most - least)))


@st.composite
def plans(draw: st.DrawFn, most_ranks: int = 5) -> Plan:
    """Any schedule of the catalogue at a shape that suits it."""
    schedule: Schedule = draw(st.sampled_from(SCHEDULES))
    ranks = 2 * draw(st.integers(1, most_ranks // 2))
    return schedule.plan(ranks, 2 * ranks * draw(st.integers(1, 2)))


def idle(plan: Plan, times: Times) -> float:
    return max(bubble(simulate(plan, times)).idle)


@few
@given(ranks_of, st.integers(1, 64), any_times)
def test_gpipe_and_1f1b_idle_for_a_fill_and_a_drain(p: int, m: int, times: Times) -> None:
    expected = flush_idle(p, times)
    whole = (m + p - 1) * (times.f + times.b + times.w)
    for plan in (gpipe(p, m), one_f_one_b(p, m)):
        found = bubble(simulate(plan, times))
        assert found.makespan == pytest.approx(whole, rel=CLOSE)
        assert found.idle == pytest.approx((expected,) * p, abs=CLOSE * whole)
        assert found.idle_to_ideal == pytest.approx((p - 1) / m, rel=CLOSE * (m + p))
        assert found.idle_to_ideal == pytest.approx(idle_to_ideal(expected, m, times), rel=CLOSE * (m + p))
        assert found.idle_share == pytest.approx((p - 1) / (m + p - 1), rel=CLOSE * (m + p))
        assert found.idle_share == pytest.approx(idle_share(expected, m, times), rel=CLOSE * (m + p))


@few
@given(st.integers(2, 8), st.integers(1, 4), st.integers(0, 4), st.integers(2, 4), any_times)
def test_interleaving_divides_the_fill_and_the_drain_by_the_chunks(
    p: int, rounds: int, more: int, v: int, times: Times
) -> None:
    m = rounds * (p + more)
    assume(m // p == rounds)  # else it is another number of rounds, which need not divide m
    timeline = simulate(interleaved_one_f_one_b(p, m, v), times)
    found = bubble(timeline)
    assert found.idle == pytest.approx((interleaved_idle(p, m, times, v),) * p, abs=CLOSE * found.makespan)
    assert max(peak_activations(timeline)) == pytest.approx(interleaved_peak(p, m, v), rel=CLOSE)
    split = bubble(simulate(zero_bubble_h1(p, m, v), times))
    assert split.idle == pytest.approx((zero_bubble_h1_idle(p, m, times, v),) * p, abs=CLOSE * split.makespan)


@pytest.mark.parametrize("closed", [interleaved_idle, zero_bubble_h1_idle])
def test_with_fewer_microbatches_than_ranks_chunks_have_no_closed_form(closed: Callable[..., float]) -> None:
    assert idle(interleaved_one_f_one_b(4, 3, 2), Times()) > flush_idle(4, Times()) / 2
    with pytest.raises(ValueError, match=r"microbatches=3: .* needs at least one per rank, 4; simulate"):
        closed(4, 3, Times(), 2)


@few
@given(ranks_of, st.integers(1, 64), any_times)
def test_zero_bubble_h1_idles_as_its_closed_form_for_all_times(p: int, m: int, times: Times) -> None:
    timeline = simulate(zero_bubble_h1(p, m), times)
    found = bubble(timeline)
    assert found.idle == pytest.approx((zero_bubble_h1_idle(p, m, times),) * p, abs=CLOSE * found.makespan)
    assert peak_activations(timeline) == (min(p, m),) * p


@few
@given(ranks_of, st.integers(0, 48), part, part, st.floats(0.0, 1.0))
def test_zero_bubble_h1_meets_the_published_form_where_weight_gradients_are_shortest(
    p: int, more: int, f: float, b: float, share: float
) -> None:
    times = Times(f=f, b=b, w=share * min(f, b))
    found = bubble(simulate(zero_bubble_h1(p, p + more), times))
    assert max(found.idle) == pytest.approx((p - 1) * (f + b - times.w), abs=CLOSE * found.makespan)


@few
@given(st.integers(1, 8), st.integers(0, 12), paired_times())
def test_the_rank_that_idles_most_under_dual_pipe_meets_the_published_formula(n: int, more: int, times: Times) -> None:
    assert dual_pipe_exact(times)
    both = simulate(dual_pipe(2 * n, 4 * n + 2 * more), times)
    folded = simulate(dual_pipe_v(n, 2 * n + more), times)
    assert max(bubble(both).idle) == pytest.approx(dual_pipe_idle(2 * n, times), abs=CLOSE * both.makespan)
    assert max(bubble(folded).idle) == pytest.approx(dual_pipe_v_idle(n, times), abs=CLOSE * folded.makespan)
    assert peak_activations(both) == (2 * n + 1,) * 2 * n
    assert peak_activations(folded) == ((2 * n + 1) / 2,) * n


@pytest.mark.parametrize(
    "f, b, w, pair", [(1, 2, 1, None), (2, 1, 1, None), (1, 1, 2, None), (1, 1, 1, 4), (1, 1, 1, 1)]
)
def test_dual_pipes_formula_is_wrong_outside_its_domain_and_refuses(f: float, b: float, w: float, pair: float) -> None:
    times = Times(f=f, b=b, w=w, pair=pair)
    whole = f + b + w if pair is None else pair
    assert idle(dual_pipe(8, 16), times) != pytest.approx(3 * (whole + b - 2 * w))
    with pytest.raises(ValueError, match="exact only for f = b >= w"):
        dual_pipe_idle(8, times)


@few
@given(st.integers(1, 8), st.integers(0, 12), any_times)
def test_a_bidirectional_plan_is_its_folded_one_run_by_two_mirrored_ranks(n: int, more: int, times: Times) -> None:
    m = 2 * n + more
    both = simulate(dual_pipe(2 * n, 2 * m), times)
    folded = simulate(dual_pipe_v(n, m), times)
    for rank in range(2 * n):
        ours = [span.end / 2 for span in both.rows[rank]]
        theirs = [span.end for span in folded.rows[min(rank, 2 * n - 1 - rank)]]
        assert ours == pytest.approx(theirs, rel=CLOSE)


@few
@given(plans(), any_times, st.floats(0.0, 2.0))
def test_no_step_starts_before_what_it_needs_and_no_rank_does_two_at_once(plan: Plan, times: Times, hop: float) -> None:
    times = Times(f=times.f, b=times.b, w=times.w, hop=hop)
    timeline = simulate(plan, times)
    done = {
        result: (rank, span.end)
        for rank, row in enumerate(timeline.rows)
        for span in row
        for action in span.step.actions
        for result in action.results
    }
    for rank, row in enumerate(timeline.rows):
        assert [span.step for span in row] == list(plan.rows[rank])
        assert all(before.end <= after.start for before, after in pairwise(row))
        for span in row:
            ready = [done[need] for action in span.step.actions for need in action.needs(plan.stages)]
            arrivals = [end if source == rank else end + hop for source, end in ready]
            before = max((other.end for other in row if other.end <= span.start), default=0.0)
            # It starts at the first moment it can: no earlier, no later.
            assert span.start == max([before, *arrivals])


@few
@given(plans(), any_times, st.floats(0.1, 10.0))
def test_slower_hardware_stretches_a_timeline_and_slower_messages_only_lengthen_it(
    plan: Plan, times: Times, scale: float
) -> None:
    base = simulate(plan, times).makespan
    slower = Times(f=times.f * scale, b=times.b * scale, w=times.w * scale)
    assert simulate(plan, slower).makespan == pytest.approx(base * scale, rel=CLOSE)
    far = Times(f=times.f, b=times.b, w=times.w, hop=scale)
    assert simulate(plan, far).makespan >= base


@few
@given(plans(), any_times)
def test_no_schedule_beats_its_work_and_the_way_of_one_microbatch(plan: Plan, times: Times) -> None:
    found = bubble(simulate(plan, times))
    work = plan.microbatches * (times.f + times.b + times.w)
    assert found.work == pytest.approx((work,) * plan.ranks, rel=CLOSE)
    assert found.makespan >= work * (1 - CLOSE)
    assert found.makespan >= plan.ranks * (times.f + times.b) + times.w * plan.ranks / plan.stages - CLOSE * work
    assert found.idle_share == pytest.approx(1 - work / found.makespan, abs=CLOSE)
    assert 0 <= found.span_share <= found.idle_share + CLOSE


@few
@given(plans(most_ranks=4), any_times, st.data())
def test_the_period_is_the_largest_mean_over_all_cycles_of_ranks(plan: Plan, times: Times, data: st.DataObject) -> None:
    load = tuple(data.draw(st.lists(part, min_size=plan.stages, max_size=plan.stages)))
    times = Times(f=times.f, b=times.b, w=times.w, load=load, hop=0.25)
    ranks = range(plan.ranks)
    # after[j][i]: how much later than rank j's start rank i ends, if rank j alone has a start to wait for.
    alone = [tuple(0.0 if rank == j else float("-inf") for rank in ranks) for j in ranks]
    after = [[row[-1].end for row in simulate(plan, times, release).rows] for release in alone]
    cycles = [cycle for length in range(1, plan.ranks + 1) for cycle in permutations(ranks, length)]
    means = [sum(after[a][b] for a, b in zip(c, c[1:] + c[:1], strict=True)) / len(c) for c in cycles]
    period = steady_period(plan, times)
    assert period == pytest.approx(max(means), rel=CLOSE)
    found = bubble(simulate(plan, times))
    assert max(found.work) * (1 - CLOSE) <= period <= found.makespan * (1 + CLOSE)


@few
@given(plans(), st.data())
def test_any_action_taken_out_or_doubled_is_found(plan: Plan, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, plan.ranks - 1))
    at = data.draw(st.integers(0, len(plan.rows[rank]) - 1))
    row = plan.rows[rank]
    for changed in (row[:at] + row[at + 1 :], row[:at] + row[at : at + 1] + row[at:]):
        broken = Plan(
            plan.name, plan.microbatches, plan.placement, (*plan.rows[:rank], changed, *plan.rows[rank + 1 :])
        )
        with pytest.raises(ValueError, match=r"is nowhere in the plan|is the second"):
            validate(broken)


def refusal(plan: Plan, send: Send = "buffered") -> str:
    try:
        validate(plan, send)
    except ValueError as error:
        return str(error)
    return ""


@few
@given(plans(), st.data())
def test_neighbours_that_change_places_give_a_plan_that_runs_or_is_refused(plan: Plan, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, plan.ranks - 1))
    row = list(plan.rows[rank])
    at = data.draw(st.integers(1, len(row) - 1))
    row[at - 1], row[at] = row[at], row[at - 1]
    changed = Plan(
        plan.name, plan.microbatches, plan.placement, (*plan.rows[:rank], tuple(row), *plan.rows[rank + 1 :])
    )
    refused = refusal(changed)
    if refused:
        assert "comes before" in refused or "deadlock" in refused
        with pytest.raises(ValueError, match="deadlock"):
            simulate(changed, Times())
    else:
        assert [span.step for span in simulate(changed, Times()).rows[rank]] == row


@few
@given(st.sampled_from(SCHEDULES), st.integers(1, 6), st.integers(1, 20))
def test_a_stricter_send_never_frees_a_plan(schedule: Schedule, ranks: int, microbatches: int) -> None:
    try:
        plan = schedule.plan(ranks, microbatches)
    except ValueError:
        assume(False)
    sends: tuple[Send, ...] = ("buffered", "batched", "rendezvous")
    runs = [not refusal(plan, send) for send in sends]
    assert runs[0]
    assert runs == sorted(runs, reverse=True)
