"""Layers of experts by themselves: every arm computes what it should, and what the kernel keeps and takes of memory."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from bench.bench_moe import costs
from bench.expert_layers import COMPILED, DENSE, KERNEL, PEER, TRUTH, Arm, Shape, build, check, routing_of
from bench.meters.memory import peak_bytes
from bench.meters.saved import saved_bytes
from dsv3.moe.kernels.experts import why_not

CPU = torch.device("cpu")
SMALL = Shape(tokens=96, hidden=64, inner=32, experts=8, k=2)
TAKING = {
    "many rows": Shape(512, 128, 64, 16, 4),
    "few rows": Shape(128, 128, 64, 16, 2),
    "wide": Shape(128, 256, 64, 8, 2),
}
needs_kernel = pytest.mark.skipif(why_not() is not None, reason=f"no kernel here: {why_not()}")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Each thread has scratch memory of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gradients_of(shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of the gradients of all experts' weights."""
    return 3 * shape.experts * shape.hidden * shape.inner * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routed", ["uniform", "balanced"])
def test_every_arm_equals_the_reference(dtype: torch.dtype, routed: str) -> None:
    arms = build(SMALL, dtype, CPU, routed=routed)
    assert set(arms) >= {PEER, "looped", "grouped", "padded", "padded_128", "dense", TRUTH}
    check(arms, dtype)
    with torch.no_grad():
        arms["padded_128"].parameters[0][3] += 1.0
    with pytest.raises(AssertionError, match="padded_128"):
        check(arms, dtype)


def test_the_gate_learns_in_every_routed_arm() -> None:
    arms = {name: arm for name, arm in build(SMALL, torch.bfloat16, CPU).items() if name not in DENSE}
    assert PEER in arms
    for arm in arms.values():
        arm.step()
        shapes = [leaf.grad.shape for leaf in arm.inputs if leaf.grad is not None]
        assert shapes == [(SMALL.tokens, SMALL.hidden), (SMALL.tokens, SMALL.k)]


@needs_kernel  # a compiler, that is
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a", "ignore:.torch.jit.:DeprecationWarning")
@pytest.mark.slow
def test_the_compiled_peer_equals_the_reference() -> None:
    """The compiled dense layer is not compiled here: checks of its shapes, which tests turn on, stand in the way."""
    assert set(COMPILED.values()) == {PEER, "dense"}
    torch.compiler.reset()
    check(build(SMALL, torch.float32, CPU, names=(TRUTH, "transformers_compiled")), torch.float32)


@needs_kernel
def test_dense_layers_do_as_many_flops() -> None:
    found = {name: costs(SMALL, torch.float32, CPU, name)[0].value for name in (*DENSE, *KERNEL, PEER)}
    assert set(found.values()) == {SMALL.flops}


def test_balanced_routing_gives_every_expert_as_many_rows() -> None:
    assert routing_of(SMALL, "balanced").counts.tolist() == [SMALL.rows] * SMALL.experts
    routing = routing_of(Shape(40, 64, 32, 8, 8), "balanced")
    assert all(row.unique().numel() == 8 for row in routing.indices)


@needs_kernel
def test_what_the_kernel_keeps_is_flat_in_granularity() -> None:
    """Twice the experts a token, half as wide: x, h, and a few bytes for each row. h does not grow."""
    coarse, fine = Shape(1024, 256, 256, 16, 2), Shape(1024, 256, 128, 32, 4)
    kept = []
    for shape in (coarse, fine):
        arm = build(shape, torch.float32, CPU, names=("kernel",))["kernel"]
        bytes_kept = saved_bytes(arm.output, arm.parameters).value
        rows = shape.tokens * shape.k
        least = 4 * (shape.tokens * shape.hidden + rows * 2 * shape.inner)
        assert least < bytes_kept <= least + 24 * rows + 8 * shape.experts
        kept.append(bytes_kept)
    assert kept[1] == pytest.approx(kept[0], rel=0.02)


@needs_kernel
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TAKING)
def test_a_step_takes_gradients_activations_sums_and_little_else(name: str, dtype: torch.dtype) -> None:
    """Of memory: gradients of the weights; h, a and dh of 5 F numbers a row; y and dx in float32 and in x's type."""
    shape, size = TAKING[name], dtype.itemsize
    rows, wide = shape.tokens * shape.k, shape.hidden + shape.inner
    sums = shape.tokens * shape.hidden * (2 * 4 + (2 * size if size < 4 else 0))
    least = gradients_of(shape, dtype) + 5 * rows * shape.inner * size + sums
    indices = 48 * rows + 32 * (shape.experts + 1)  # six of 8 bytes a row to sort pairs and weigh them, and the starts
    # Scratch: the four passes together hold two numbers of each width for every row of the fullest expert, and four for
    # each of a tile's 64 rows.
    longest = int(routing_of(shape, "uniform").counts.max())
    scratch = 4 * wide * (2 * longest + 4 * 64)
    taken = costs(shape, dtype, CPU, "kernel")[-1]
    assert taken.metric == "taken_bytes"
    assert least < taken.value <= least + indices + scratch


@needs_kernel
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TAKING)
def test_besides_gradients_of_weights_a_step_takes_half_of_the_peers(name: str, dtype: torch.dtype) -> None:
    """Numbers taken for a row: by the kernel 5 F, by the peer 10 F and 9 D; for a token, 2 D by the peer and by the
    kernel as much as 6 D of two bytes each. From 2 rows a token on, half of the peer's leaves 4 D for scratch.

    Gradients of the weights both take whole. So all in all it is at most 0.6 where they are a fifth of the peer's bytes
    or less; in bfloat16 few rows an expert make them a larger part.
    """
    shape = TAKING[name]
    taken = {arm: costs(shape, dtype, CPU, arm)[-1].value for arm in ("kernel", PEER)}
    gradients = gradients_of(shape, dtype)
    assert taken["kernel"] - gradients <= 0.5 * (taken[PEER] - gradients)
    if name == "many rows" or dtype == torch.float32:
        assert taken["kernel"] <= 0.6 * taken[PEER]


@needs_kernel
def test_a_hundred_steps_need_no_more_than_one() -> None:
    def steps(number: int) -> float:
        def call(arm: Arm) -> None:
            for _ in range(number):
                arm.step()

        anew = partial(build, TAKING["many rows"], torch.float32, CPU, names=("kernel",))
        return peak_bytes(lambda: anew()["kernel"], call)[0].value

    assert steps(100) == steps(1)


def test_a_way_of_routing_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="routed='even': must be uniform, balanced or text; choose one of them"):
        routing_of(SMALL, "even")
