"""Every dispatch against the reference, values and gradients, on awkward shapes."""

import copy
import pickle
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv3.moe import Routing
from dsv3.moe.dispatch import GROUPED, Dispatch, choose, chosen_here, grouped, kernel, looped, padded, reference
from dsv3.moe.kernels.experts import fits, instruction_sets, why_not
from dsv3.moe.looped import blocks
from dsv3.moe.memory import ReusedMemory
from dsv3.moe.routing import count
from tests.moe.layers import random_routing, stacked_experts

# Name: tokens, experts, K, hidden, inner, share of pairs kept.
SHAPES = {
    "ordinary": (63, 8, 2, 32, 16, 1.0),
    "one token": (1, 8, 2, 32, 16, 1.0),
    "every expert for every token": (5, 4, 4, 16, 8, 1.0),
    "more experts than rows": (3, 60, 2, 16, 8, 1.0),
    "no token": (0, 8, 2, 32, 16, 1.0),
    "one expert": (100, 1, 1, 16, 8, 1.0),
    "some pairs dropped": (63, 8, 2, 32, 16, 0.7),
    "every pair dropped": (7, 4, 2, 16, 8, 0.0),
    "several blocks of experts": (3500, 6, 3, 8, 8, 0.9),
}
DISPATCHES = {"grouped": grouped, "looped": looped, "padded": padded}
FORMS = (reference, *DISPATCHES.values())


def run(dispatch: Dispatch, routing: Routing, hidden: int, inner: int, dtype: torch.dtype) -> list[Tensor]:
    """The output, and the gradients of x, of the gate weights and of the experts' weights."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(len(routing.indices), hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    toward = torch.randn(len(x), hidden, generator=generator, dtype=torch.float64).to(dtype)
    gate_up, down = stacked_experts(len(routing.counts), hidden, inner, dtype)
    y = dispatch(x, routing, gate_up, down)
    assert y.dtype == dtype
    return [y, *torch.autograd.grad(y, (x, routing.weights, gate_up, down), toward)]


def tolerance(dtype: torch.dtype, length: int) -> float:
    """Sums of `length` products in another order: eps sqrt(length), and up to eight roundings on the way."""
    return 8 * torch.finfo(dtype).eps * length**0.5


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dispatch", DISPATCHES.values(), ids=DISPATCHES.keys())
def test_values_and_gradients_equal_the_reference(
    dispatch: Dispatch, dtype: torch.dtype, shape: tuple[int, int, int, int, int, float]
) -> None:
    tokens, experts, k, hidden, inner, kept = shape
    routing = random_routing(tokens, experts, k, dtype, kept=kept)
    got, want = (run(form, routing, hidden, inner, dtype) for form in (dispatch, reference))
    for found, truth in zip(got, want, strict=True):
        largest = max(truth.abs().flatten().tolist(), default=0.0) or 1.0
        bound = tolerance(dtype, max(hidden, int(routing.counts.max()))) * largest
        torch.testing.assert_close(found, truth, rtol=0.0, atol=bound)


@pytest.mark.parametrize("dispatch", DISPATCHES.values(), ids=DISPATCHES.keys())
def test_input_and_weight_gradients_may_be_asked_for_apart(dispatch: Dispatch) -> None:
    routing = random_routing(63, 8, 2, torch.float32, kept=0.7)
    x = torch.randn(63, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
    inputs, stacked = (x, routing.weights), stacked_experts(8, 32, 16, torch.float32)
    y = dispatch(x, routing, *stacked)
    toward = y.detach().cos()
    together = torch.autograd.grad(y, (*inputs, *stacked), toward, retain_graph=True)
    apart = [torch.autograd.grad(y, leaves, toward, retain_graph=True) for leaves in (inputs, stacked)]
    assert all(torch.equal(one, other) for one, other in zip(together, (*apart[0], *apart[1]), strict=True))


def test_all_tokens_on_one_expert_leave_the_others_without_gradient() -> None:
    indices = torch.full((9, 1), 2)
    routing = Routing(indices, torch.ones(9, 1, requires_grad=True), torch.rand(9, 4), count(indices, 4))
    for dispatch in FORMS:
        _, _, _, dgate_up, ddown = run(dispatch, routing, 16, 8, torch.float32)
        for gradient in (dgate_up, ddown):
            assert gradient[2].abs().sum() > 0
            assert gradient[[0, 1, 3]].abs().sum() == 0


@pytest.mark.parametrize("kept", [1.0, 0.6])
@pytest.mark.parametrize("dispatch", [reference, looped, padded])
def test_gradients_are_the_derivatives_in_float64(dispatch: Dispatch, kept: float) -> None:
    routing = random_routing(5, 4, 2, torch.float64, kept=kept)
    gate_up, down = stacked_experts(4, 3, 2, torch.float64)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)

    def routed(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return dispatch(x, replace(routing, weights=weights), gate_up, down)

    assert torch.autograd.gradcheck(routed, (x, routing.weights, gate_up, down))


def test_a_dropped_pair_adds_nothing_and_its_weight_has_no_gradient() -> None:
    routing = random_routing(6, 4, 2, torch.float32)
    kept = torch.ones(6, 2, dtype=torch.bool)
    kept[3] = False
    for dispatch in FORMS:
        y, dx, dweights, *_ = run(dispatch, replace(routing, kept=kept), 16, 8, torch.float32)
        assert y[3].abs().sum() == 0
        assert dx[3].abs().sum() == 0
        assert dweights[3].abs().sum() == 0
        assert dweights[:3].abs().min() > 0


def test_bfloat16_contributions_are_summed_in_float32() -> None:
    # 256 plus eight times 0.5 is 260; a sum in bfloat16 stays at 256, where its numbers are 2 apart.
    experts, hidden, inner = 9, 8, 8
    gate_up = torch.zeros(experts, hidden, 2 * inner)
    gate_up[:, 0, 0], gate_up[:, 0, inner] = 32.0, 1.0
    down = torch.zeros(experts, inner, hidden)
    down[:, 0, 0] = 1 / 32
    indices = torch.arange(experts).view(1, experts)
    weights = torch.tensor([[256.0] + [0.5] * 8]).bfloat16()
    routing = Routing(indices, weights, torch.ones(1, experts), count(indices, experts))
    x = torch.ones(1, hidden).bfloat16()
    for dispatch in FORMS:
        assert dispatch(x, routing, gate_up.bfloat16(), down.bfloat16())[0, 0].item() == 260.0


@pytest.mark.usefixtures("annotations_unchecked")
def test_compiled_dispatch_is_one_graph_and_gives_the_same_bits() -> None:
    routing = random_routing(13, 5, 2, torch.float32, kept=0.7)

    def compiled(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
        return torch.compile(looped, fullgraph=True, backend="aot_eager")(x, routing, gate_up, down)

    for found, truth in zip(
        run(compiled, routing, 16, 8, torch.float32), run(looped, routing, 16, 8, torch.float32), strict=True
    ):
        assert torch.equal(found, truth)


def test_results_repeat_bit_for_bit() -> None:
    routing = random_routing(63, 8, 2, torch.float32)
    first, second = (run(looped, routing, 32, 16, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("counts", [[0], [5], [0, 0, 7, 0, 3, 0], [4] * 9])
def test_blocks_cover_every_expert_and_row_once_in_order(counts: list[int]) -> None:
    found = list(blocks(counts, rows=8))
    assert [size for block in found for size in block.sizes] == counts
    assert [block.experts.start for block in found[1:]] == [block.experts.stop for block in found[:-1]]
    assert [block.rows.start for block in found[1:]] == [block.rows.stop for block in found[:-1]]
    assert (found[0].rows.start, found[-1].rows.stop) == (0, sum(counts))
    assert all(block.rows.stop - block.rows.start >= 8 for block in found[:-1])


@pytest.mark.parametrize(
    "dtype, width, name, chosen",
    [
        (torch.float32, 16, "looped", looped),
        (torch.float32, 16, "kernel", kernel),
        (torch.bfloat16, 16, "grouped", grouped),
        (torch.bfloat16, 12, "grouped", looped),  # 24 bytes: the grouped product refuses them
    ],
)
def test_choice_on_a_cpu_is_that_of_the_table(
    dtype: torch.dtype, width: int, name: str, chosen: Dispatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr("dsv3.moe.dispatch.fastest", lambda *given: asked.append(given) or name)
    x, down = torch.zeros(12, width, dtype=dtype), torch.zeros(8, 16, width, dtype=dtype, requires_grad=True)
    best = instruction_sets()[0] if fits(x, down) and why_not() is None else "none"
    found = choose(x, random_routing(12, 8, 2, dtype), down)
    assert getattr(found, "func", found) is chosen
    with torch.no_grad():
        choose(x, random_routing(12, 8, 2, dtype), down)
    monkeypatch.setattr("dsv3.moe.dispatch.why_not", lambda: "no compiler")
    choose(x, random_routing(12, 8, 2, dtype), down.detach())
    assert asked == [(best, dtype, "training", 3), (best, dtype, "forward", 3), ("none", dtype, "forward", 3)]


@pytest.mark.parametrize("dtype", GROUPED, ids=str)
@pytest.mark.parametrize("without", [False, True], ids=["as it is", "without the kernel"])
def test_what_is_said_to_be_chosen_here_is_chosen(
    dtype: torch.dtype, without: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if without:
        monkeypatch.setattr("dsv3.moe.dispatch.why_not", lambda: "no compiler")
    said = chosen_here()
    assert (said.pop("instructions") == "none") == (without or why_not() is not None)
    for rows, place in ((4, 0), (1024, -1)):
        x, routing = torch.zeros(rows, 16, dtype=dtype), random_routing(rows, 2, 2, dtype)
        for direction in ("forward", "training"):
            down = torch.zeros(2, 16, 16, dtype=dtype, requires_grad=direction == "training")
            found = choose(x, routing, down)
            steps = re.findall("kernel|grouped|looped", said[f"{str(dtype).removeprefix('torch.')} {direction}"])
            assert getattr(found, "func", found).__name__ == steps[place]


def test_memory_is_lent_again_once_nothing_uses_it() -> None:
    memory, like = ReusedMemory(), torch.empty(3, 5, dtype=torch.bfloat16)
    first = memory.empty_like(like)
    assert (first.shape, first.dtype, first.is_contiguous()) == (like.shape, like.dtype, True)
    address, alias = first.data_ptr(), first[1].detach()
    other = memory.empty_like(like)
    assert other.data_ptr() != address
    del first
    assert memory.empty_like(like).data_ptr() != address, "a view of the loan is still in use"
    del alias
    assert memory.empty_like(like).data_ptr() == address


def test_kept_gradients_survive_later_steps() -> None:
    routing = random_routing(9, 4, 2, torch.float32)
    gate_up, down = stacked_experts(4, 16, 8, torch.float32)
    memory = ReusedMemory(), ReusedMemory()

    def step(scale: float) -> None:
        looped(torch.full((9, 16), scale), routing, gate_up, down, memory).sum().backward()

    step(1.0)
    kept = gate_up.grad
    assert kept is not None
    before = kept.clone()
    gate_up.grad = down.grad = None
    step(2.0)
    assert torch.equal(kept, before)
    assert gate_up.grad is not None
    # Without clearing, a second backward adds to the first.
    once = gate_up.grad.clone()
    step(2.0)
    torch.testing.assert_close(gate_up.grad, 2 * once)


def test_memory_is_left_behind_by_copies_and_pickles() -> None:
    memory = ReusedMemory()
    lent = memory.empty_like(torch.empty(4))
    for other in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert other.empty_like(lent).data_ptr() != lent.data_ptr()
