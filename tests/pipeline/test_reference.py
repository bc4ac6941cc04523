"""Small plans and timelines worked out by hand."""

import pytest

from dsv3.pipeline import (
    Plan,
    Times,
    activations,
    bubble,
    dual_pipe,
    dual_pipe_v,
    gpipe,
    interleaved_one_f_one_b,
    one_f_one_b,
    parse,
    peak_activations,
    simulate,
    steady_period,
    steady_share,
    zero_bubble_h1,
)

WRITTEN: list[tuple[Plan, str]] = [
    (
        gpipe(2, 3),
        """
        0F0,0F1,0F2,0B0,0B1,0B2
        1F0,1F1,1F2,1B0,1B1,1B2
        """,
    ),
    (
        one_f_one_b(3, 4),
        """
        0F0,0F1,0F2,0B0,0F3,0B1,0B2,0B3
        1F0,1F1,1B0,1F2,1B1,1F3,1B2,1B3
        2F0,2B0,2F1,2B1,2F2,2B2,2F3,2B3
        """,
    ),
    (
        one_f_one_b(3, 1),
        """
        0F0,0B0
        1F0,1B0
        2F0,2B0
        """,
    ),
    (
        interleaved_one_f_one_b(2, 2, chunks=2),
        """
        0F0,0F1,2F0,2F1,2B0,2B1,0B0,0B1
        1F0,1F1,3F0,3B0,3F1,3B1,1B0,1B1
        """,
    ),
    (
        zero_bubble_h1(3, 4),
        """
        0F0,0F1,0F2,0I0,0W0,0F3,0I1,0W1,0I2,0W2,0I3,0W3
        1F0,1F1,1I0,1F2,1I1,1W0,1F3,1I2,1W1,1I3,1W2,1W3
        2F0,2I0,2F1,2I1,2F2,2I2,2W0,2F3,2I3,2W1,2W2,2W3
        """,
    ),
    (
        dual_pipe(2, 4),
        """
        0F0,1F2,0F1,1B2,(1F3;0B0)OVERLAP_F_B,1B3,0I1,0W1
        0F2,1F0,0F3,1B0,(1F1;0B2)OVERLAP_F_B,1B1,0I3,0W3
        """,
    ),
    (
        dual_pipe_v(1, 2),
        """
        0F0,1F0,0F1,1B0,(1F1;0B0)OVERLAP_F_B,1B1,0I1,0W1
        """,
    ),
    (
        # Follows deepseek-ai/DualPipe's step() through its eight phases, rank by rank.
        dual_pipe(4, 8),
        """
        0F0,0F1,0F2,3F4,3I4,3W4,3F5,(0F3;3B5)OVERLAP_F_B,(3F6;0B0)OVERLAP_F_B,3B6,(3F7;0B1)OVERLAP_F_B,3B7,0I2,0W2,0I3,0W3
        1F0,2F4,1F1,2F5,1F2,2B4,(2F6;1B0)OVERLAP_F_B,(1F3;2B5)OVERLAP_F_B,(2F7;1B1)OVERLAP_F_B,2B6,1B2,2I7,1I3,2W7,1W3
        1F4,2F0,1F5,2F1,1F6,2B0,(2F2;1B4)OVERLAP_F_B,(1F7;2B1)OVERLAP_F_B,(2F3;1B5)OVERLAP_F_B,2B2,1B6,2I3,1I7,2W3,1W7
        0F4,0F5,0F6,3F0,3I0,3W0,3F1,(0F7;3B1)OVERLAP_F_B,(3F2;0B4)OVERLAP_F_B,3B2,(3F3;0B5)OVERLAP_F_B,3B3,0I6,0W6,0I7,0W7
        """,
    ),
]


@pytest.mark.parametrize("plan, text", WRITTEN, ids=[f"{p.name}-{p.ranks}x{p.microbatches}" for p, _ in WRITTEN])
def test_a_plan_is_what_its_paper_draws(plan: Plan, text: str) -> None:
    assert str(plan).split() == text.split()
    assert parse(text.strip(), name=plan.name) == plan


def spans(plan: Plan, times: Times) -> list[list[tuple[str, float, float]]]:
    return [[(str(span.step), span.start, span.end) for span in row] for row in simulate(plan, times).rows]


def test_two_ranks_under_1f1b_take_the_times_worked_out_by_hand() -> None:
    assert spans(one_f_one_b(2, 2), Times(f=1, b=2, w=3, hop=0.5)) == [
        [("0F0", 0, 1), ("0F1", 1, 2), ("0B0", 8, 13), ("0B1", 14, 19)],
        [("1F0", 1.5, 2.5), ("1B0", 2.5, 7.5), ("1F1", 7.5, 8.5), ("1B1", 8.5, 13.5)],
    ]


def test_split_backward_lets_the_gradient_go_before_the_weights() -> None:
    assert spans(zero_bubble_h1(2, 2), Times(f=1, b=2, w=3)) == [
        [("0F0", 0, 1), ("0F1", 1, 2), ("0I0", 4, 6), ("0W0", 6, 9), ("0I1", 9, 11), ("0W1", 11, 14)],
        [("1F0", 1, 2), ("1I0", 2, 4), ("1F1", 4, 5), ("1I1", 5, 7), ("1W0", 7, 10), ("1W1", 10, 13)],
    ]


def test_a_pair_waits_for_both_of_its_needs_and_sends_both_when_it_ends() -> None:
    plan = dual_pipe_v(1, 2)
    assert spans(plan, Times(f=2, b=2, w=2, pair=5))[0][3:6] == [
        ("1B0", 3, 5),
        ("(1F1;0B0)OVERLAP_F_B", 5, 7.5),
        ("1B1", 7.5, 9.5),
    ]
    across = parse("0F0,1F1,(0F2;1B1)OVERLAP_F_B\n0F1,1F0,1F2", name="excerpt")
    ends = {str(span.step): span.end for row in simulate(across, Times(hop=1)).rows for span in row}
    assert ends["1F2"] == ends["(0F2;1B1)OVERLAP_F_B"] + 1 + 1


def test_interleaved_stages_take_their_share_of_a_device() -> None:
    first = spans(interleaved_one_f_one_b(2, 2, chunks=2), Times(f=4, b=2, w=2))[0]
    assert [end - start for _, start, end in first] == [2.0] * 8


def test_uneven_stages_slow_their_own_rank_only() -> None:
    rows = simulate(gpipe(2, 1), Times(load=(0.5, 1.5))).rows
    assert [[span.end - span.start for span in row] for row in rows] == [[0.5, 1.0], [1.5, 3.0]]


def test_the_definitions_of_the_bubble_for_1f1b_over_four_ranks() -> None:
    timeline = simulate(one_f_one_b(4, 8), Times())
    found = bubble(timeline)
    assert found.makespan == 33
    assert found.work == (24,) * 4
    assert found.idle == (9,) * 4
    assert found.idle_share == pytest.approx(3 / 11)
    assert found.idle_to_ideal == pytest.approx(3 / 8)
    # The ranks' own spans are 33, 30, 27 and 24.
    assert found.span_share == pytest.approx((9 / 33 + 6 / 30 + 3 / 27 + 0) / 4)


def test_activations_rise_with_a_forward_and_fall_with_the_last_part_of_its_backward() -> None:
    timeline = simulate(one_f_one_b(2, 2), Times())
    assert activations(timeline)[0] == ((0, 1), (1, 2), (6, 1), (9, 0))
    assert activations(timeline)[1] == ((1, 1), (4, 0), (4, 1), (7, 0))
    assert peak_activations(timeline) == (2, 1)
    assert activations(simulate(zero_bubble_h1(1, 1), Times()))[0] == ((0, 1), (3, 0))


def test_a_chunk_counts_as_its_share_of_a_microbatch() -> None:
    assert peak_activations(simulate(interleaved_one_f_one_b(4, 8, chunks=2), Times())) == (5.5, 4.5, 3.5, 2.5)


def test_the_period_is_that_of_the_slowest_cycle_of_ranks() -> None:
    # Rank 0 is busy to the last end, so a step can follow only after all of it.
    assert steady_period(one_f_one_b(4, 8), Times()) == 33
    assert steady_share(one_f_one_b(4, 8), Times()) == pytest.approx(3 / 11)
    # Forward only down a chain: each rank runs without a gap, however long the chain.
    chain = parse("0F0,0F1\n1F0,1F1\n2F0,2F1", name="chain")
    assert steady_period(chain, Times()) == 2
    assert bubble(simulate(chain, Times())).idle_share == pytest.approx(1 / 2)
    assert bubble(simulate(chain, Times())).span_share == 0
    # A message out and back: rank 0 waits for four stages of half a device and two hops before it can go on.
    loop = parse("0F0,3F0\n1F0,2F0", name="loop")
    assert steady_period(loop, Times(f=2, hop=1)) == 4 * 1 + 2 * 1


def test_the_deepseek_shape_has_the_published_idle_times() -> None:
    # 15360 sequences over 128 pipelines of 16 ranks, one sequence per microbatch.
    plain, dual = (bubble(simulate(make(16, 120), Times())) for make in (one_f_one_b, dual_pipe))
    assert plain.idle_to_ideal == pytest.approx(15 / 120)
    assert plain.idle_share == pytest.approx(15 / 135)
    assert dual.idle == (14,) * 16
    assert dual.idle_share == pytest.approx(14 / 374)
