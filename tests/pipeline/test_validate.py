"""Plans that are none: the first violation is named. Text that is none: the cell is named."""

import pytest

from dsv3.pipeline import Action, Pair, Plan, Times, one_f_one_b, parse, simulate, validate


@pytest.mark.parametrize(
    "text, message",
    [
        ("0F0,0B0\n1F0", "action='1I0': is nowhere in the plan"),
        ("0F0,0I0\n1F0,1B0", "action='0W0': is nowhere in the plan"),
        ("0F0,0B0,0F1\n1F0,1B0,1F1,1B1", "action='0I1': is nowhere in the plan"),
        ("0F0,0B0\n1F0,1B0,1B0", "action='1B0': is the second I of stage 1 and microbatch 0, on rank 1"),
        ("0F0,0B0,0W0\n1F0,1B0", "action='0W0': is the second W of stage 0 and microbatch 0, on rank 0"),
        ("0F0,0B0,1F0\n1F0,1B0", "action='1F0': is the second F of stage 1 and microbatch 0, on rank 1"),
        ("0F0,1F0,0B0\n1B0", "action='1I0': is on rank 1, but its forward is on rank 0"),
        ("0B0,0F0\n1F0,1B0", "action='0B0': comes before 0F0 on rank 0"),
        ("0F0,0W0,0I0\n1F0,1B0", "action='0W0': comes before 0I0 on rank 0"),
        ("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0", "deadlock, rank 0 at 0B0 waits for 1I0; rank 1 at 1F1 waits for 0F1;"),
        ("0F0,1F0,1B0,0B0\n2F0,2B0,3F0,3B0", "deadlock, rank 0 at 1B0 waits for 2I0; rank 1 at 2B0 waits for 3I0;"),
        ("(0F0;0B0)OVERLAP_F_B", "action='0B0': comes before 0F0 on rank 0"),
    ],
)
def test_the_first_violation_of_a_plan_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^[a-z]+=") as raised:
        validate(parse(text, name="broken"))
    assert message in str(raised.value)


def test_an_action_on_a_rank_without_its_stage_is_named() -> None:
    rows = parse("0F0,1F0\n1B0,0B0", name="").rows
    with pytest.raises(ValueError, match="action='1F0': is on rank 0, which holds stages 0; move it"):
        validate(Plan("broken", 1, ((0,), (1,)), rows))


def test_a_microbatch_beyond_the_plan_is_named() -> None:
    with pytest.raises(ValueError, match="action='0F2': is on rank 0, and the plan has 2 microbatches"):
        validate(Plan("broken", 2, ((0,), (1,), (2,)), one_f_one_b(3, 4).rows))


def test_a_plan_whose_ranks_wait_for_each_other_cannot_be_simulated() -> None:
    with pytest.raises(ValueError, match="plan='knot': deadlock, rank 0 at 0B0 waits for 1I0"):
        simulate(parse("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0", name="knot"), Times())


def test_an_unknown_kind_of_send_is_refused() -> None:
    with pytest.raises(ValueError, match="send='eager': must be one of buffered, batched, rendezvous"):
        validate(one_f_one_b(2, 2), "eager")  # type: ignore[arg-type]


@pytest.mark.parametrize("cell", ["F0", "0X0", "0F", "0F0;1B0", "(0F0)OVERLAP_F_B", "0SEND_F1", "(0F0;1B0)"])
def test_a_cell_that_is_no_step_is_named(cell: str) -> None:
    with pytest.raises(ValueError, match="is not an action; write"):
        parse(f"0F0,{cell}", name="broken")


def test_empty_cells_are_idle_slots_and_ignored() -> None:
    assert str(parse("0F0,,0B0\n,1F0,1B0,", name="spaced")) == "0F0,0B0\n1F0,1B0\n"


@pytest.mark.parametrize("text", ["", "0F0\n\n1F0", "0F0\n,"])
def test_a_line_without_a_step_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="needs at least one step on every line"):
        parse(text, name="broken")


def test_values_that_are_no_plan_are_refused() -> None:
    with pytest.raises(ValueError, match="kind='X': must be F, I, W or B"):
        Action(0, "X", 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="microbatch=-1: counts from 0"):
        Action(0, "F", -1)
    with pytest.raises(ValueError, match="must be a forward and a backward"):
        Pair(Action(0, "B", 0), Action(1, "F", 0))
    with pytest.raises(ValueError, match="microbatches=0: must be a whole number"):
        Plan("broken", 0, ((0,),), ((Action(0, "F", 0),),))
    with pytest.raises(ValueError, match=r"placement=.*must have one entry per rank, and there are 1 rows"):
        Plan("broken", 1, ((0,), (1,)), ((Action(0, "F", 0),),))


def test_a_rank_without_work_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rows\[1\]=\(\): needs a stage and at least one step; leave a rank without"):
        Plan("broken", 1, ((0,), (1,)), ((Action(0, "F", 0),), ()))


def test_times_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"b=-1: must be a finite number >= 0"):
        Times(b=-1)
    with pytest.raises(ValueError, match=r"pair=-1: must be a finite number >= 0"):
        Times(pair=-1)
    with pytest.raises(ValueError, match="must not all be 0"):
        Times(f=0, b=0, w=0)
    with pytest.raises(ValueError, match=r"load=.*must not be negative"):
        Times(load=(1, -1))
    with pytest.raises(ValueError, match="must have one entry per stage, 2; or leave it empty"):
        simulate(one_f_one_b(2, 2), Times(load=(1.0,)))
