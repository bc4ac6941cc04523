"""The experts' Triton kernel computes what the reference does: interpreted on a CPU, compiled where there is a GPU."""

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from bench.meters.flops import flops
from bench.meters.saved import saved_bytes
from dsv3.moe import Routing
from dsv3.moe.dispatch import choose, sort_pairs, triton
from dsv3.moe.kernels import triton_experts
from dsv3.moe.routing import count
from tests.moe.layers import random_routing
from tests.moe.test_kernel import drawn, exact

NOT_INTERPRETED = triton_experts.why_not("cpu")
DEVICE = "cuda" if NOT_INTERPRETED else "cpu"
REASON = NOT_INTERPRETED and triton_experts.why_not("cuda")
needs_triton = pytest.mark.skipif(REASON is not None, reason=f"no Triton here: {REASON}")
every_format = pytest.mark.parametrize("dtype", triton_experts.FORMATS, ids=str)
# float32: sums of a few hundred products of about 1, eps is 1.2e-7; the others: h, a, dh and the pairs are rounded to
# 2^-9 and 2^-12, and the interpreter cuts off what it should round to bf16
NEAR = {torch.float32: 2e-6, torch.bfloat16: 4e-2, torch.float16: 2e-3}
# tokens, experts, K, hidden, inner, share of pairs kept; an interpreter takes milliseconds for a tile
SHAPES = {
    "ordinary": (33, 4, 2, 32, 16, 1.0),
    "one token": (1, 4, 2, 16, 16, 1.0),
    "no token": (0, 4, 2, 16, 16, 1.0),
    "every expert for every token": (5, 4, 4, 16, 24, 1.0),
    "more experts than rows": (3, 9, 2, 16, 16, 1.0),
    "odd widths": (21, 3, 2, 19, 37, 1.0),
    "one expert of many rows": (140, 1, 1, 16, 16, 1.0),
    "some pairs dropped": (26, 3, 2, 35, 20, 0.7),
    "every pair dropped": (7, 4, 2, 16, 16, 0.0),
}
SMALL = SHAPES["some pairs dropped"]


@pytest.fixture(params=[None, 16], ids=["one tile", "small tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that hold whole matrices of these sizes, and tiles of which they take several."""
    if request.param is not None:
        for name in ("TILE", "DEPTH"):
            monkeypatch.setattr(triton_experts, name, {2: request.param, 4: request.param})


def run(leaves: tuple[Tensor, ...], routing: Routing) -> Tensor:
    """Where the kernel runs; the leaves stay where they are, so that their gradients can be compared."""
    x, weights, *stacked = (leaf.to(DEVICE) for leaf in leaves)
    return triton(x, placed(replace(routing, weights=weights)), *stacked).cpu()


def placed(routing: Routing) -> Routing:
    return replace(routing, **{name: x.to(DEVICE) for name, x in vars(routing).items() if isinstance(x, Tensor)})


def results(y: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    toward = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    return [y, *torch.autograd.grad(y, leaves, toward, retain_graph=True)]


def near(found: list[Tensor], truth: list[Tensor], bound: float) -> None:
    for one, other in zip(found, truth, strict=True):
        largest = max([1.0, *other.abs().flatten().tolist()])
        torch.testing.assert_close(one.double(), other, rtol=0.0, atol=bound * largest)


@needs_triton
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@every_format
def test_values_and_gradients_are_those_of_float64(
    shape: tuple[int, int, int, int, int, float], dtype: torch.dtype
) -> None:
    leaves, routing = drawn(shape, dtype)
    y = run(leaves, routing)
    assert y.dtype == dtype
    near(results(y, leaves), exact(leaves, routing), NEAR[dtype])


@needs_triton
@given(
    st.integers(0, 20), st.integers(1, 4), st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**31), st.booleans()
)
@settings(max_examples=6)
def test_any_routing_of_any_width_is_right(
    tokens: int, number: int, wide: int, inner: int, seed: int, dropping: bool
) -> None:
    shape = (tokens, number, seed % number + 1, wide, inner, 0.5 if dropping else 1.0)
    leaves, routing = drawn(shape, torch.float32)
    near(results(run(leaves, routing), leaves), exact(leaves, routing), NEAR[torch.float32])


@needs_triton
@every_format
def test_the_same_call_gives_the_same_bits(dtype: torch.dtype) -> None:
    leaves, routing = drawn(SMALL, dtype)
    one, two = (results(run(leaves, routing), leaves) for _ in range(2))
    assert all(torch.equal(*both) for both in zip(one, two, strict=True))


@needs_triton
def test_each_gradient_is_the_same_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of one graph one after the other, and of graphs in which nothing else has a gradient; then none of the
    passes for others run.
    """
    leaves, routing = drawn(SMALL, torch.float32)
    y = run(leaves, routing)
    _, *together = results(y, leaves)
    toward = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    made = list[str]()
    for name in ("_input_grad", "_matrix_grad"):
        form = getattr(triton_experts, name)
        monkeypatch.setattr(
            triton_experts, name, lambda *given, form=form, name=name: made.append(name) or form(*given)
        )
    for leaf, right in zip(leaves, together, strict=True):
        (apart,) = torch.autograd.grad(y, leaf, toward, retain_graph=True)
        assert torch.equal(apart, right)
    made.clear()
    for at, right in enumerate(together):
        alone = tuple(leaf.detach().requires_grad_(place == at) for place, leaf in enumerate(leaves))
        (found,) = torch.autograd.grad(run(alone, replace(routing, weights=alone[1])), alone[at], toward)
        assert torch.equal(found, right)
    assert made == ["_input_grad", "_matrix_grad", "_matrix_grad"]


@needs_triton
def test_all_tokens_on_one_expert_leave_the_others_without_gradient() -> None:
    leaves, _ = drawn((9, 4, 1, 16, 16, 1.0), torch.float32)
    indices = torch.full((9, 1), 2)
    routing = Routing(indices, leaves[1], torch.rand(9, 4), count(indices, 4))
    found = results(run(leaves, routing), leaves)
    near(found, exact(leaves, routing), NEAR[torch.float32])
    assert all(gradient[[0, 1, 3]].abs().sum() == 0 for gradient in found[-2:])


@needs_triton
@pytest.mark.usefixtures("tiles")
def test_nan_reaches_its_own_token_and_its_experts_alone() -> None:
    """Rows of a tile that are another expert's are not read, nor what was never written."""
    leaves, _ = drawn((6, 3, 1, 20, 20, 1.0), torch.float32)
    indices = torch.tensor([[0], [0], [1], [1], [2], [2]])
    routing = Routing(indices, leaves[1], torch.rand(6, 3), count(indices, 3))
    with torch.no_grad():
        leaves[0][2] = float("nan")
    y, dx, dweights, dgate_up, ddown = results(run(leaves, routing), leaves)
    for rows in (y, dx, dweights):
        assert rows.isnan().any(1).tolist() == [False, False, True, False, False, False]
    for gradient in (dgate_up, ddown):
        assert gradient.flatten(1).isnan().any(1).tolist() == [False, True, False]


@needs_triton
def test_strides_of_any_kind_are_read_right() -> None:
    leaves, routing = drawn(SMALL, torch.float32)
    turned = tuple(leaf.detach().mT.contiguous().mT.requires_grad_() for leaf in leaves)
    one, two = results(run(leaves, routing), leaves), results(run(turned, routing), turned)
    assert all(torch.equal(*both) for both in zip(one, two, strict=True))
    expanded, plain = (torch.autograd.grad(run(x, routing).sum(), x) for x in (turned, leaves))
    assert all(torch.equal(*both) for both in zip(expanded, plain, strict=True))


@needs_triton
def test_what_is_kept_is_flat_in_granularity() -> None:
    """Twice the experts a token, half as wide: x, h, and a few bytes for each row. h does not grow."""
    kept = []
    for k, inner in ((2, 32), (4, 16)):
        leaves, routing = drawn((64, 8, k, 96, inner, 1.0), torch.float32)
        number = saved_bytes(partial(run, leaves, routing), leaves[2:]).value
        least = 4 * (64 * 96 + 64 * k * 2 * inner)
        # beside them 4 bytes a pair for its number and 4 for its weight, and 8 an expert
        assert number == least + 8 * 64 * k + 8 * 8
        kept.append(least)
    assert kept[0] == kept[1]


@needs_triton
def test_flops_are_those_of_the_rows_that_count() -> None:
    leaves, routing = drawn(SMALL, torch.float32)
    each = int(sort_pairs(routing)[1].sum()) * SMALL[3] * SMALL[4]

    def step(asked: tuple[bool, ...]) -> None:
        given = tuple(leaf.detach().requires_grad_(wants) for leaf, wants in zip(leaves, asked, strict=True))
        run(given, replace(routing, weights=given[1])).sum().backward()

    for asked, times in (((True,) * 4, 18), ((True, False, False, False), 12), ((False, True, False, True), 10)):
        assert flops(partial(step, asked)).value == times * each


@needs_triton
@pytest.mark.usefixtures("annotations_unchecked")
def test_the_kernel_is_one_operator_to_the_compiler() -> None:
    leaves, routing = drawn(SMALL, torch.float32)
    given = tuple(leaf.detach().to(DEVICE).requires_grad_() for leaf in leaves)
    routing = placed(replace(routing, weights=given[1]))
    compiled = torch.compile(triton, fullgraph=True, backend="aot_eager")
    one, two = (results(form(given[0], routing, *given[2:]), given) for form in (compiled, triton))
    assert all(torch.equal(*both) for both in zip(one, two, strict=True))
    pair, counts = sort_pairs(routing)
    torch.library.opcheck(torch.ops.dsv3_triton_experts.forward.default, (*given, pair.int(), counts, True))


@needs_triton
def test_there_is_no_second_derivative() -> None:
    leaves, routing = drawn(SHAPES["one token"], torch.float32)
    (grad,) = torch.autograd.grad(run(leaves, routing).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("reason", [None, "Triton is missing"])
def test_a_gpu_gets_the_kernel_where_it_can_run(reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_experts, "why_not", lambda device: reason)
    routing = random_routing(8, 4, 2, torch.float32)
    with FakeTensorMode():
        for dtype in (*triton_experts.FORMATS, torch.float64):
            x, down = (torch.zeros(*sizes, dtype=dtype, device="cuda") for sizes in ((8, 16), (4, 8, 16)))
            fits = reason is None and dtype != torch.float64
            assert (choose(x, routing, down) is triton) == fits


def test_the_interpreter_is_never_chosen() -> None:
    for dtype in triton_experts.FORMATS:
        x, down = torch.zeros(8, 16, dtype=dtype), torch.zeros(4, 8, 16, dtype=dtype)
        assert choose(x, random_routing(8, 4, 2, dtype), down) is not triton


@needs_triton
def test_another_format_is_refused_by_name() -> None:
    leaves, routing = drawn(SHAPES["one token"], torch.float64)
    with pytest.raises(ValueError, match="dtype='float64': must be float32, bfloat16 or float16; convert x"):
        run(leaves, routing)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = triton_experts._missing.__wrapped__
    assert missing("meta") == "it runs on a GPU, not on meta"
    if REASON is None:
        assert "TRITON_INTERPRET=1" in missing("cuda" if DEVICE == "cpu" else "cpu")
    monkeypatch.setattr(triton_experts.importlib.util, "find_spec", lambda name: None)
    assert "Triton is missing; install it" in missing("cpu")
    monkeypatch.setattr(triton_experts, "_missing", lambda device: "Triton is missing")
    leaves, routing = drawn(SHAPES["one token"], torch.float32)
    with pytest.raises(RuntimeError, match="the Triton kernel of the experts is not at hand: Triton is missing"):
        run(leaves, routing)


# what a GPU's driver is asked before a kernel is launched; then it is compiled, and not launched
COMPILED = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from dsv3.moe.kernels import triton_experts

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

def compiled(self, *arguments, grid, warmup, **options):
    kernel = run(self, *arguments, grid=grid, warmup=True, **options)
    print(self.__name__, "wgmma" in kernel.asm["ptx"], kernel.metadata.shared < 227 * 1024)

driver.set_active(Driver())
run, JITFunction.run = JITFunction.run, compiled
tile = triton_experts._Call.tile
triton_experts._Call.tile = lambda call, *sizes: tile(call, *sizes) | {"EXACT": False}  # as on a GPU
x, weight = torch.zeros(512, 256, dtype=torch.bfloat16), torch.zeros(512, 2)
gate_up, down = torch.zeros(4, 256, 512, dtype=torch.bfloat16), torch.zeros(4, 256, 256, dtype=torch.bfloat16)
rows = (torch.arange(1024, dtype=torch.int32), torch.full((4,), 256))
y, h = triton_experts._forward(x, weight, gate_up, down, *rows, False)
triton_experts._backward(y, h, x, weight, gate_up, down, *rows, False, [True] * 4)
"""


@needs_triton
def test_the_passes_compile_for_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """To its matrix instructions and within its shared memory; the interpreter knows nothing of types."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    passes = ("hidden", "spread", "hidden_grads", "spread", "outer", "outer")
    assert done.stdout.splitlines() == [f"{name} True True" for name in passes]
