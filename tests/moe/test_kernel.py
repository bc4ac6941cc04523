"""The experts' C++ kernel computes what the reference does, on every instruction set, and refuses what it cannot."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dsv3.moe import Routing
from dsv3.moe.dispatch import kernel, reference, sort_rows
from dsv3.moe.kernels import experts
from dsv3.moe.memory import ReusedMemory
from dsv3.moe.routing import count
from tests.moe.layers import random_routing, stacked_experts

REASON = experts.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no kernel here: {REASON}")
FORMATS = [torch.float32, torch.bfloat16]
# tokens, experts, K, hidden, inner, share of pairs kept: around the edges of panels, tiles and strips
SHAPES = {
    "ordinary": (63, 8, 2, 32, 16, 1.0),
    "one token": (1, 8, 2, 32, 16, 1.0),
    "every expert for every token": (5, 4, 4, 16, 32, 1.0),
    "more experts than rows": (3, 60, 2, 16, 16, 1.0),
    "one expert of many rows": (300, 1, 1, 80, 48, 1.0),
    "tiles of several heights": (257, 2, 1, 96, 80, 1.0),
    "some pairs dropped": (130, 8, 2, 32, 64, 0.7),
    "more than is widened at a time": (200, 2, 1, 1056, 32, 1.0),
    "more rows than are widened at a time": (600, 1, 1, 80, 96, 1.0),
    "too few rows to be widened": (21, 8, 1, 1056, 32, 1.0),
    "every pair dropped": (7, 4, 2, 16, 16, 0.0),
}


def drawn(shape: tuple[int, int, int, int, int, float], dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Routing]:
    tokens, number, k, hidden, inner, kept = shape
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    routing = random_routing(tokens, number, k, torch.float32, kept=kept)
    return (x, routing.weights, *stacked_experts(number, hidden, inner, dtype)), routing


def results(y: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    toward = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, toward)]


def exact(leaves: tuple[Tensor, ...], routing: Routing) -> list[Tensor]:
    """In float64, with the gradients that the leaves would get."""
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    x, weights, gate_up, down = wide
    y = reference(x, Routing(routing.indices, weights, routing.scores, routing.counts, routing.kept), gate_up, down)
    toward = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(leaves[0].dtype).double()
    return [y, *torch.autograd.grad(y, wide, toward)]


def near(found: list[Tensor], truth: list[Tensor], dtype: torch.dtype, half: float = 2e-2) -> None:
    for one, other in zip(found, truth, strict=True):
        # float32: sums of a few thousand products of about 1, eps is 1.2e-7; bfloat16: h, a and dh are rounded to 2^-9
        bound = (1e-5 if dtype == torch.float32 else half) * max(other.abs().max().item(), 1.0)
        torch.testing.assert_close(one.double(), other, rtol=0.0, atol=bound)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_values_and_gradients_are_those_of_float64(
    shape: tuple[int, int, int, int, int, float], dtype: torch.dtype
) -> None:
    (x, weights, *stacked), routing = drawn(shape, dtype)
    y = kernel(x, routing, *stacked)
    assert y.dtype == dtype
    near(results(y, (x, weights, *stacked)), exact((x, weights, *stacked), routing), dtype)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@given(st.integers(1, 130), st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
@settings(max_examples=25)
def test_any_routing_of_any_width_is_right(
    dtype: torch.dtype, tokens: int, number: int, wide: int, inner: int, seed: int
) -> None:
    k = seed % number + 1
    (x, weights, *stacked), routing = drawn((tokens, number, k, 16 * wide, 16 * inner, 1.0), dtype)
    leaves = (x, weights, *stacked)
    found, truth = results(kernel(x, routing, *stacked), leaves), exact(leaves, routing)
    near(found, truth, dtype, half=4e-2)  # also of single numbers, where a hundred rounded terms nearly cancel


@pytest.mark.parametrize("instructions", ["amx_bf16", "avx512_bf16", "avx512", "avx2", "portable"])
@pytest.mark.parametrize("shape", ["some pairs dropped", *(name for name in SHAPES if "widened" in name)])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_each_instruction_set_computes_the_same(instructions: str, shape: str, dtype: torch.dtype) -> None:
    if instructions not in experts.instruction_sets():
        pytest.skip(f"this processor lacks {instructions}")
    (x, weights, *stacked), routing = drawn(SHAPES[shape], dtype)
    token, weight, counts = sort_rows(routing)
    y = experts.kernel_experts(x, weight, *stacked, token, counts, instructions=instructions)
    near(results(y, (x, weights, *stacked)), exact((x, weights, *stacked), routing), dtype)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    (x, weights, *stacked), routing = drawn((200, 7, 3, 208, 48, 0.9), dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(results(kernel(x, routing, *stacked), (x, weights, *stacked)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_gradients_past_the_caches_are_the_same() -> None:
    """Of weights that no cache holds, the kernel writes gradients around it."""
    leaves, routing = drawn((40, 24, 2, 256, 256, 1.0), torch.float32)
    x, _, *stacked = leaves
    assert sum(weight.nbytes for weight in stacked) > 2**23
    near(results(kernel(x, routing, *stacked), leaves), exact(leaves, routing), torch.float32)


def test_input_and_weight_gradients_may_be_asked_for_apart() -> None:
    (x, weights, *stacked), routing = drawn(SHAPES["ordinary"], torch.float32)
    y = kernel(x, routing, *stacked)
    toward = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    first = torch.autograd.grad(y, (x, weights), toward, retain_graph=True)
    then = torch.autograd.grad(y, stacked, toward)
    near([y, *first, *then], exact((x, weights, *stacked), routing), torch.float32)


@pytest.mark.usefixtures("annotations_unchecked")
def test_the_kernel_is_one_operator_to_the_compiler() -> None:
    (x, weights, *stacked), routing = drawn(SHAPES["some pairs dropped"], torch.float32)
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    found, right = (results(form(x, routing, *stacked), (x, weights, *stacked)) for form in (compiled, kernel))
    assert all(torch.equal(one, two) for one, two in zip(found, right, strict=True))
    token, weight, counts = sort_rows(routing)
    given = tuple(leaf.detach().requires_grad_() for leaf in (x, weight, *stacked))
    torch.library.opcheck(torch.ops.dsv3_experts.forward.default, (*given, token, counts, ""))


def test_flops_are_those_of_the_rows_that_count() -> None:
    (x, weights, *stacked), routing = drawn(SHAPES["some pairs dropped"], torch.float32)
    rows = int(sort_rows(routing).counts.sum())
    with FlopCounterMode(display=False) as forward:
        y = kernel(x, routing, *stacked)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(y.sum(), (x, weights, *stacked))
    assert (forward.get_total_flops(), backward.get_total_flops()) == (6 * rows * 32 * 64, 12 * rows * 32 * 64)


def test_kept_gradients_survive_later_steps_though_memory_is_lent() -> None:
    (x, _, *stacked), routing = drawn(SHAPES["ordinary"], torch.float32)
    memory = ReusedMemory(), ReusedMemory()
    first = torch.autograd.grad(kernel(x, routing, *stacked, memory).sum(), stacked, retain_graph=True)
    before = [grad.clone() for grad in first]
    again = torch.autograd.grad(kernel(2 * x, routing, *stacked, memory).sum(), stacked, retain_graph=True)
    assert all(torch.equal(one, two) for one, two in zip(first, before, strict=True))
    assert not torch.equal(first[0], again[0])


def test_nan_reaches_its_own_token_and_its_experts_alone() -> None:
    (x, weights, *stacked), _ = drawn((6, 3, 1, 16, 16, 1.0), torch.float32)
    indices = torch.tensor([[0], [0], [1], [1], [2], [2]])
    routing = Routing(indices, weights, torch.rand(6, 3), count(indices, 3))
    with torch.no_grad():
        x[2] = float("nan")
    y, dx, _, dgate_up, ddown = results(kernel(x, routing, *stacked), (x, weights, *stacked))
    assert y.isnan().any(1).tolist() == [False, False, True, False, False, False]
    assert dx.isnan().any(1).tolist() == [False, False, True, False, False, False]
    for grad in (dgate_up, ddown):
        assert grad.flatten(1).isnan().any(1).tolist() == [False, True, False]


def test_what_the_kernel_cannot_compute_is_refused_by_name() -> None:
    (x, _, gate_up, down), routing = drawn(SHAPES["ordinary"], torch.float32)
    token, weight, counts = sort_rows(routing)
    call = torch.ops.dsv3_experts.forward
    with pytest.raises(ValueError, match="dtype=Double: must be float32 or bfloat16"):
        call(x.double(), weight, gate_up.double(), down.double(), token, counts, "")
    with pytest.raises(ValueError, match="widths=20, 16: must be multiples of 16"):
        call(x[:, :20], weight, gate_up[:, :20], down[..., :20], token, counts, "")
    with pytest.raises(ValueError, match="token=63: must be a row of x"):
        call(x, weight, gate_up, down, token + 1, counts, "")
    with pytest.raises(ValueError, match="counts: must add up to at most 126 rows"):
        call(x, weight, gate_up, down, token, counts + 1, "")
