"""A rank's share and what it sends, against hand-worked numbers and what must hold for every split."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.budget.activations import POLICIES, Batch, kept_bytes
from bench.budget.shares import fullest, in_flight, shares
from bench.budget.splits import SCHEDULES, Schedule, Split, check, held
from bench.budget.states import recipe
from bench.budget.traffic import sent
from dsv3.config import Grouped, MultiHead, presets, vary
from dsv3.model import cost
from dsv3.pipeline import Times, named, peak_activations, simulate

BATCH = Batch(sequences=1, length=64, element=2)
TINY = presets.tiny().model
V3 = presets.deepseek_v3().model


def powers(most: int) -> st.SearchStrategy[int]:
    return st.sampled_from([2**power for power in range(most.bit_length())])


@st.composite
def splits(draw: st.DrawFn) -> Split:
    dp = draw(powers(64))
    return Split(
        tp=draw(powers(4)),
        pp=draw(st.integers(1, TINY.num_hidden_layers)),
        ep=min(dp, draw(powers(16))),
        dp=dp,
        zero=draw(st.integers(0, 3)),
        microbatches=draw(st.integers(1, 9)),
        sequence_parallel=draw(st.booleans()),
    )


@given(pp=st.integers(1, 4), ep=powers(16))
def test_the_stages_hold_every_parameter_once(pp: int, ep: int) -> None:
    split = Split(pp=pp, ep=ep, dp=ep)
    stages = held(TINY, split)
    assert sum(stage["dense"] + ep * stage["experts"] for stage in stages) == cost.parameters(TINY)


@given(splits())
def test_cutting_further_never_costs_a_rank_memory(split: Split) -> None:
    most = fullest(shares(TINY, split, recipe("mixed"), BATCH))
    alone = fullest(shares(TINY, Split(microbatches=split.microbatches), recipe("mixed"), BATCH))
    assert most.parameters <= alone.parameters
    assert most.optimizer <= alone.optimizer
    assert most.activations <= alone.activations * min(split.pp, split.microbatches)


@given(splits())
def test_a_higher_stage_of_zero_keeps_no_more_states(split: Split) -> None:
    def states(zero: int) -> int:
        most = fullest(shares(TINY, vary(split, zero=zero), recipe("deepseek"), BATCH))
        return most.parameters + most.gradients + most.optimizer

    totals = [states(zero) for zero in range(4)]
    assert totals == sorted(totals, reverse=True)


@given(splits())
def test_one_way_of_a_parallelism_sends_nothing_of_its_kind(split: Split) -> None:
    found = sent(TINY, split, recipe("bfloat16"), BATCH, 0)
    ways = {"data": split.dp, "tensor": split.tp, "pipeline": split.pp, "expert": split.ep}
    assert all(found[kind] == 0 for kind in ways if ways[kind] == 1)
    assert all(value >= 0 for value in found.values())


def test_a_rank_alone_has_the_whole_model() -> None:
    (share,) = shares(TINY, Split(), recipe("bfloat16"), BATCH)
    parameters = cost.parameters(TINY)
    assert (share.parameters, share.gradients, share.optimizer) == (2 * parameters, 2 * parameters, 4 * parameters)
    assert share.activations == kept_bytes(TINY, BATCH)


def test_deepseek_v3s_own_split_worked_by_hand() -> None:
    split = Split(pp=16, ep=64, dp=128, zero=1, microbatches=120)
    stages = shares(V3, split, recipe("deepseek"), Batch(sequences=1, length=4096, element=2), "selective")
    # stage 0 has layers 0 to 3: three dense ones, one of experts of which 4 of 256 are here, and the embedding
    experts = 4 * 3 * 7168 * 2048
    dense = 3 * 583_483_392 + (11_507_286_016 - 64 * experts) + 926_679_040
    assert held(V3, split)[0] == {"dense": dense, "experts": experts}
    assert stages[0].parameters == 2 * (dense + experts)
    assert stages[0].optimizer == 8 * (-(-dense // 128) + -(-experts // 2))
    assert split.ranks == 2048


def test_1f1b_holds_fewer_microbatches_on_later_stages() -> None:
    flat = vary(TINY, mtp=None, moe=None)
    found = shares(flat, Split(pp=4, microbatches=3), recipe("bfloat16"), BATCH, "full")
    block = 2 * 64 * 128  # a block keeps its input
    assert [share.activations for share in found[1:3]] == [3 * block, 2 * block]


def test_bytes_sent_worked_by_hand() -> None:
    flat = vary(TINY, mtp=None, moe=None, attention=MultiHead(num_attention_heads=4, head_dim=32))
    activation, parameters = 2 * 64 * 128, cost.parameters(flat)
    ring = sent(flat, Split(dp=4), recipe("bfloat16"), BATCH, 0)
    assert ring == {"data": 2 * 2 * parameters * 3 // 4, "tensor": 0, "pipeline": 0, "expert": 0}
    # two all-reduces of four in each of four blocks, the embedding's and the head's, over two ranks: 2 x 1/2 each
    assert sent(flat, Split(tp=2), recipe("bfloat16"), BATCH, 0)["tensor"] == (4 * 4 + 2) * activation
    middle = sent(flat, Split(pp=4, microbatches=5), recipe("bfloat16"), BATCH, 1)
    assert middle["pipeline"] == 5 * 2 * activation
    one_layer = vary(TINY, mtp=None, num_hidden_layers=2)
    rows = 64 * 4
    assert sent(one_layer, Split(ep=2, dp=2), recipe("bfloat16"), BATCH, 0)["expert"] == 4 * 2 * rows * 128 // 2


FEW = vary(  # parameters worked by hand: embedding and head 64 x 8 each, four matrices of attention 8 x 8, three norms
    TINY,
    vocab_size=64,
    hidden_size=8,
    num_hidden_layers=1,
    intermediate_size=16,
    attention=MultiHead(num_attention_heads=1, head_dim=8),
    moe=None,
    mtp=None,
)


@pytest.mark.parametrize(
    "zero, bytes_sent",
    [
        (0, 10_128),  # all-reduce of 6,752 B of gradients: 2 x 3/4 of them
        (1, 5_064 + 2_532),  # reduce-scatter 3/4 of the gradients, all-gather 3/4 of 3,376 B of parameters
        (2, 3 * 5_064 + 2_532),  # the gradients of each of three microbatches
        (3, 3 * (5_064 + 2 * 2_532)),  # and the parameters, for forward and for backward
    ],
)
def test_bytes_of_every_stage_of_zero_worked_by_hand(zero: int, bytes_sent: int) -> None:
    split = Split(dp=4, zero=zero, microbatches=3)
    assert cost.parameters(FEW) == 2 * 64 * 8 + 4 * 8 * 8 + 3 * 8 + 3 * 8 * 16 == 1_688
    found = sent(FEW, split, recipe("deepseek"), BATCH, 0)  # 2 B of weight and 4 B of gradient for each parameter
    assert found == {"data": bytes_sent, "tensor": 0, "pipeline": 0, "expert": 0}


def test_experts_are_exchanged_among_the_ranks_that_hold_the_same_ones() -> None:
    assert TINY.moe is not None
    moe = vary(TINY.moe, n_routed_experts=4, num_experts_per_tok=1, n_group=1, topk_group=1, moe_intermediate_size=4)
    model = vary(FEW, moe=vary(moe, n_shared_experts=0), first_k_dense_replace=0)
    # four experts of 3 x 8 x 4, two of them here; a router of 4 x 8 stands for the dense network of 3 x 8 x 16
    dense, experts = 1_688 - 384 + 32, 192
    assert held(model, Split(ep=2, dp=4))[0] == {"dense": dense, "experts": experts}
    found = sent(model, Split(ep=2, dp=4, zero=1), recipe("bfloat16"), BATCH, 0)
    assert found["data"] == 4 * dense * 3 // 4 + 4 * experts * 1 // 2 == 4_008 + 384


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pp, microbatches", [(2, 4), (4, 8), (8, 22)])
def test_as_many_microbatches_are_in_flight_as_the_simulated_plan_holds(
    schedule: Schedule, pp: int, microbatches: int
) -> None:
    split = Split(pp=pp, microbatches=microbatches, schedule=schedule)
    plan = named(schedule).plan(pp, microbatches)
    most = peak_activations(simulate(plan, Times()))
    for rank in range(pp):
        assert plan.placement[rank] == tuple(sorted(split.stages(rank)))
        assert sum(in_flight(split, stage) for stage in split.stages(rank)) == most[rank]


def test_dual_pipe_holds_a_stage_and_its_mirror() -> None:
    plain = Split(pp=4, dp=8, zero=1, microbatches=8)
    both = vary(plain, schedule="dual_pipe")
    flat = vary(TINY, mtp=None, moe=None)
    one, two = (shares(flat, split, recipe("deepseek"), BATCH, "full") for split in (plain, both))
    for rank, share in enumerate(two):
        mirror = one[3 - rank]
        assert share.parameters == one[rank].parameters + mirror.parameters
        assert share.gradients == one[rank].gradients + mirror.gradients
        assert share.optimizer == -(-8 * share.parameters // 2 // 16)  # 8 B a parameter, over twice as many ranks
        assert share.activations == one[rank].activations + mirror.activations
    wider, narrower = (sent(flat, split, recipe("deepseek"), BATCH, 1) for split in (both, plain))
    assert wider["pipeline"] == narrower["pipeline"], "half of the microbatches through each of two stages"
    assert wider["data"] == (4 + 2) * two[1].parameters // 2 * 15 // 16


@pytest.mark.parametrize("policy", POLICIES)
def test_a_sequence_that_is_cut_keeps_less_on_each_rank(policy: str) -> None:
    whole, cut = (
        fullest(shares(TINY, Split(tp=4, sequence_parallel=sp), recipe("bfloat16"), BATCH, policy)).activations
        for sp in (False, True)
    )
    assert cut < whole


@pytest.mark.parametrize(
    "split, model, message",
    [
        (Split(tp=3), V3, r"tp=3: must divide num_attention_heads=128; use"),
        (Split(pp=62), V3, r"pp=62: must be at most num_hidden_layers=61.*; use fewer"),
        (Split(ep=3, dp=3), V3, r"ep=3: must divide n_routed_experts=256; use"),
        (Split(ep=2, dp=2), vary(TINY, moe=None, mtp=None), r"ep=2: must be 1: the model has no experts"),
        (
            Split(tp=4),
            vary(TINY, attention=Grouped(num_attention_heads=4, num_key_value_heads=2, head_dim=32)),
            r"tp=4: must divide num_key_value_heads=2",
        ),
    ],
)
def test_a_split_that_does_not_come_out_even_is_refused(split: Split, model: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(model, split)


def test_numbers_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="ep=8: must divide dp=4"):
        Split(ep=8, dp=4)
    with pytest.raises(ValueError, match=r"pp=3: must be even.*use 4"):
        Split(pp=3, microbatches=8, schedule="dual_pipe")
    with pytest.raises(ValueError, match=r"microbatches=7: must be even and at least 2 pp = 8"):
        Split(pp=4, microbatches=7, schedule="dual_pipe")
    with pytest.raises(ValueError, match="schedule='gpipe': must be one_f_one_b or dual_pipe"):
        Split(schedule="gpipe")
    with pytest.raises(ValueError, match="zero=4"):
        Split(zero=4)
    with pytest.raises(ValueError, match="recipe='fp4': must be one of float32"):
        recipe("fp4")
