"""The Triton kernel computes what the reference does: interpreted on a CPU, compiled where there is a GPU."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from bench.meters.flops import flops
from dsv3.attention import Selection, attend, choice, implementation, why_not_triton
from dsv3.attention.choice import SHORTEST
from dsv3.attention.kernels import triton_blocks
from dsv3.attention.select import per_head, window
from tests.attention.lists import NOT_INTERPRETED, SHAPES, close, draw, grads, right, select

DEVICE = "cuda" if NOT_INTERPRETED else "cpu"
REASON = NOT_INTERPRETED and triton_blocks.why_not("cuda", 16)
needs_triton = pytest.mark.skipif(REASON is not None, reason=f"no Triton here: {REASON}")

FORMATS = [torch.float32, torch.bfloat16]
# as SHAPES, and smaller: an interpreter takes milliseconds for a tile
EVERY = {
    "one token": SHAPES["one token"],
    "decoding": (1, 4, 2, 4, 1, 70, 16, 16, 64, 16),
    "30 of 50": (1, 4, 2, 2, 30, 50, 48, 32, 16, 16),
    "latent": (1, 2, 1, 1, 100, 100, 24, 16, 64, 64),
    "odd widths": (1, 2, 2, 2, 40, 60, 7, 5, 32, 48),
    "long blocks": (1, 2, 1, 2, 70, 90, 16, 40, 66, 70),
    "groups by the token": (1, 8, 2, 2, 10, 27, 16, 16, 1, 16),
    "heads by the token": (1, 4, 2, 4, 9, 30, 16, 16, 1, 16),
    "three heads a group": (1, 6, 2, 2, 50, 50, 16, 16, 25, 20),
    "lists of all heads": (2, 2, 2, 1, 20, 20, 16, 16, 8, 3),
}
every_shape = pytest.mark.parametrize("shape", EVERY.values(), ids=EVERY.keys())
every_format = pytest.mark.parametrize("dtype", FORMATS, ids=str)


def placed(leaves: tuple[Tensor, ...], selection: Selection) -> tuple[tuple[Tensor, ...], Selection]:
    """Where the kernel runs; the leaves stay where they are, so that their gradients can be compared."""
    moved = {name: x.to(DEVICE) for name, x in vars(selection).items() if isinstance(x, Tensor)}
    return tuple(x.to(DEVICE) for x in leaves), replace(selection, **moved)


def run(leaves: tuple[Tensor, ...], selection: Selection, scale: float | None = None) -> Tensor:
    (q, k, v), there = placed(leaves, selection)
    return attend(q, k, v, there, scale=scale, implementation="triton").cpu()


@needs_triton
@every_shape
@every_format
def test_values_and_gradients_are_those_of_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    leaves, selection = draw(shape, dtype), select(shape)
    ours, theirs = run(leaves, selection, 0.3), right(leaves, shape, selection, 0.3)
    # fp32: eps is 1.2e-7, logits of up to 5 keep 5 of them; bf16: results are rounded to 2^-9, weights too on a GPU,
    # and the interpreter cuts off what it should round
    close(ours, theirs, 1e-6 if dtype == torch.float32 else 1e-2)
    for mine, exact in zip(grads(ours, leaves), grads(theirs, leaves), strict=True):
        close(mine, exact, 3e-6 if dtype == torch.float32 else 2e-2)


@needs_triton
@every_shape
def test_weights_and_a_rule_per_token_are_those_of_the_reference(shape: tuple[int, ...]) -> None:
    generator, (batch, _, _, shared, queries, total, *_) = torch.Generator().manual_seed(3), shape
    # a key's rank is its age, so that every query sees itself
    rank = -torch.arange(total).expand(batch, shared, -1)
    reach = torch.randint(0, total, (batch, shared, queries), generator=generator)
    limit = reach - torch.arange(total - queries, total)
    weights = torch.randn(batch, shared, total, generator=generator).requires_grad_()
    ruled = replace(select(shape), rank=rank, limit=limit, weights=weights)
    leaves = (*draw(shape), weights)
    ours, theirs = run(leaves[:3], ruled), right(leaves, shape, ruled, shape[6] ** -0.5)
    close(ours, theirs, 1e-6)
    for mine, exact in zip(grads(ours, leaves), grads(theirs, leaves), strict=True):
        close(mine, exact, 3e-6)


@needs_triton
@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(0, 30), st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=8)
def test_any_blocks_of_any_sequence_equal_the_plain_path(
    seed: int, queries: int, before: int, block_q: int, block_k: int
) -> None:
    shape = (1, 2, 1, 1 + seed % 2, queries, before + queries, 9, 6, block_q, block_k)
    leaves, selection = draw(shape, seed=seed), select(shape, seed=seed)
    ours, theirs = run(leaves, selection), attend(*leaves, selection, implementation="plain")
    close(ours, theirs, 2e-6)
    for mine, other in zip(grads(ours, leaves), grads(theirs, leaves), strict=True):
        close(mine, other, 6e-6)


@needs_triton
@every_format
def test_the_same_call_gives_the_same_bits(dtype: torch.dtype) -> None:
    shape = (1, 4, 2, 2, 40, 50, 20, 32, 10, 16)
    leaves, selection = draw(shape, dtype), select(shape)
    one, two = ((out, *grads(out, leaves)) for out in (run(leaves, selection), run(leaves, selection)))
    assert all(torch.equal(*both) for both in zip(one, two, strict=True))


@needs_triton
@pytest.mark.parametrize("cut", [1, 31, 32, 50])
@every_format
def test_no_output_changes_by_a_bit_when_later_tokens_change(cut: int, dtype: torch.dtype) -> None:
    shape = (1, 2, 2, 2, 70, 70, 16, 16, 32, 32)
    selection, before = select(shape), draw(shape, dtype)
    after = [x.detach().clone() for x in before]
    for x, other in zip(after, draw(shape, dtype, seed=1), strict=True):
        x[:, :, cut:] = 30 * other.detach()[:, :, cut:]
    one, two = run(before, selection), run(tuple(after), selection)
    assert torch.equal(one[:, :, :cut], two[:, :, :cut])
    assert not torch.equal(one[:, :, cut:], two[:, :, cut:])


@needs_triton
@every_format
def test_decoding_and_prefill_in_parts_equal_the_whole(dtype: torch.dtype) -> None:
    shape = (1, 4, 2, 2, 30, 30, 16, 16, 1, 16)
    (q, k, v), whole = draw(shape, dtype), select(shape)
    full, parts = run((q, k, v), whole), []
    for first, stop in ((0, 20), (20, 29), (29, 30)):
        listed = {"indices": whole.indices[:, :, first:stop], "counts": whole.counts[:, :, first:stop]}
        part = (q[:, :, first:stop], k[:, :, :stop], v[:, :, :stop])
        parts.append(run(part, replace(whole, **listed)))
    close(torch.cat(parts, dim=2), full, 1e-6 if dtype == torch.float32 else 2**-8)


@needs_triton
@pytest.mark.parametrize("queries", [1, 40, 70])
def test_all_blocks_and_no_selection_are_dense_attention(queries: int) -> None:
    shape = (1, 4, 2, 1, queries, 70, 16, 24, 64, 64)
    leaves = draw(shape)
    for selection in (None, select(shape, keep=1.0)):
        dense = attend(*leaves)
        if selection is None:
            ours = attend(*(x.to(DEVICE) for x in leaves), implementation="triton").cpu()
        else:
            ours = run(leaves, selection)
        close(ours, dense, 1e-6)
        for mine, other in zip(grads(ours, leaves), grads(dense, leaves), strict=True):
            close(mine, other, 5e-6)


@needs_triton
@every_format
def test_strides_of_any_kind_are_read_as_they_are(dtype: torch.dtype) -> None:
    shape = (2, 2, 2, 2, 30, 30, 18, 18, 16, 16)
    selection, plain = select(shape), draw(shape, dtype)
    wide = [torch.randn(2, 2, 30, 37).to(dtype)[..., 1::2] for _ in range(3)]  # every second number of odd rows
    odd = [torch.randn(2, 2, 30, 19).to(dtype)[..., 1:] for _ in range(3)]
    whole = run(tuple(x.contiguous() for x in plain), selection)
    for views in (wide, odd, [x.detach().mT.contiguous().mT for x in plain]):
        for view, x in zip(views, plain, strict=True):
            view.copy_(x.detach())
        assert torch.equal(run(tuple(views), selection), whole)


@needs_triton
def test_a_tile_is_as_large_as_shared_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (1, 1, 1, 1, 60, 60, 192, 128, 64, 64)
    leaves, selection = draw(shape, torch.bfloat16), select(shape)
    sizes, found = [], []
    tile = triton_blocks._Call._tile
    monkeypatch.setattr(
        triton_blocks._Call, "_tile", lambda call, **asked: sizes.append(tile(call, **asked)) or sizes[-1]
    )
    # an H100's, and that of a GPU with 99 KiB
    for room in (75 * 1024, 33 * 1024):
        monkeypatch.setattr(triton_blocks, "_room", lambda device, room=room: room)
        out = run(leaves, selection)
        found.append((out, *grads(out, leaves)))
    assert {(x["ROWS"], x["COLUMNS"], x["WIDE"], x["REST"]) for x in sizes[:3]} == {(64, 64, 128, 64)}
    assert {(x["ROWS"], x["COLUMNS"]) for x in sizes[3:]} == {(32, 32)}
    for one, two in zip(*found, strict=True):
        close(one, two, 2e-2)


@needs_triton
def test_a_gradient_that_is_expanded_is_read_right() -> None:
    shape = (2, 2, 2, 2, 30, 30, 16, 16, 16, 16)
    leaves, selection = draw(shape), select(shape)
    ours, theirs = run(leaves, selection), attend(*leaves, selection, implementation="plain")
    for mine, other in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (ours, theirs)), strict=True):
        close(mine, other, 3e-6)


@needs_triton
@pytest.mark.usefixtures("annotations_unchecked")
def test_the_kernel_is_one_operator_to_the_compiler() -> None:
    shape = (1, 2, 2, 2, 20, 20, 16, 16, 16, 16)
    leaves, selection = placed(draw(shape), select(shape))
    leaves = tuple(x.detach().requires_grad_() for x in leaves)

    def called(*leaves: Tensor) -> Tensor:
        return attend(*leaves, selection, implementation="triton")

    ours, eager = torch.compile(called, fullgraph=True, backend="aot_eager")(*leaves), called(*leaves)
    assert torch.equal(ours, eager)
    pull = torch.ones_like(eager)
    compiled, plain = (torch.autograd.grad(x, leaves, pull) for x in (ours, eager))
    assert all(torch.equal(one, two) for one, two in zip(compiled, plain, strict=True))
    for heads in (1, 2):  # lists, and weights, of all heads and of each
        weights = torch.randn(1, heads, 20, device=DEVICE).requires_grad_()
        lists = (selection.indices[:, :heads], selection.counts[:, :heads], 16, 16, 0.25, weights, None, None, None)
        torch.library.opcheck(torch.ops.dsv3_triton.forward.default, (*leaves, *lists))


@needs_triton
def test_autocast_decides_the_format() -> None:
    shape = (1, 2, 2, 2, 20, 20, 16, 16, 16, 16)
    leaves, selection = draw(shape), select(shape)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = run(leaves, selection)
    assert out.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in grads(out, leaves))


@needs_triton
def test_there_is_no_second_derivative() -> None:
    shape = (1, 1, 1, 1, 10, 10, 16, 16, 16, 16)
    leaves = draw(shape)
    out = run(leaves, select(shape))
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@needs_triton
def test_the_operators_cost_the_pairs_of_the_definition() -> None:
    chosen = window(1, 20, 30, size=5, sink=3)
    leaves = draw((1, 4, 2, 1, 20, 30, 16, 24))
    pairs = 4 * chosen.cost.kept
    both = flops(lambda: run(leaves, chosen).sum().backward()).value
    assert both == 2 * pairs * (16 + 24) + 2 * pairs * (3 * 16 + 2 * 24)


@pytest.mark.parametrize("reason", [None, "Triton is missing"])
def test_a_gpu_gets_the_kernel_unless_blocks_are_short_where_it_can_run(
    reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_blocks, "why_not", lambda device, width: reason)
    with FakeTensorMode():
        q = torch.zeros(1, 2, 100, 8, device="cuda")
    whole = select((1, 2, 2, 2, 100, 100, 8, 8, 64, SHORTEST))
    assert implementation(q, whole) == ("triton" if reason is None else "plain")
    short = select((1, 2, 2, 2, 100, 100, 8, 8, 64, SHORTEST - 1))
    assert implementation(q, window(1, 100, 100, size=5)) == implementation(q, whole)
    others = (None, short, per_head(torch.zeros(1, 2, 100), 100, k=5))
    assert [implementation(q, selection) for selection in others] == ["plain"] * 3
    assert implementation(q.double(), whole) == "plain"


def test_the_interpreter_is_never_chosen() -> None:
    whole = select((1, 2, 2, 2, 100, 100, 8, 8, 64, 64))
    assert implementation(torch.zeros(1, 2, 100, 8), whole) != "triton"


@needs_triton
def test_another_format_is_refused_by_name() -> None:
    q = torch.zeros(1, 1, 4, 8, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match="implementation='triton': cannot be used here: it computes in float32 or"):
        attend(q, q, q, implementation="triton")


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not_triton(torch.zeros(1, 1, 4, 8, device="meta")) == "it runs on a GPU, not on meta"
    monkeypatch.setattr(choice.triton_blocks.importlib.util, "find_spec", lambda name: None)
    assert "Triton is missing; install it" in (triton_blocks._missing.__wrapped__("cpu") or "")
    monkeypatch.setattr(triton_blocks, "_missing", lambda device: None)
    assert why_not_triton(torch.zeros(1, 1, 4, 257)) == "its tiles hold widths of at most 256, not 257"


@needs_triton
def test_triton_must_have_been_told_where_it_runs_before_it_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    from dsv3.attention.kernels import triton_passes

    missing = triton_blocks._missing.__wrapped__
    other, said = ("cuda", "has it interpreted, on a CPU") if DEVICE == "cpu" else ("cpu", "or interpreted on a CPU")
    assert said in (missing(other) or "")
    function = triton_passes.forward
    late = triton.JITFunction(function.fn) if DEVICE == "cpu" else triton.runtime.interpreter.InterpretedFunction
    monkeypatch.setattr(triton_passes, "forward", late)
    assert "TRITON_INTERPRET=1" in (missing(DEVICE) or "")


# what a GPU's driver is asked before a kernel is launched; then it is compiled, and not launched
COMPILED = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from dsv3.attention.kernels import triton_blocks

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

def compiled(self, *arguments, grid, warmup, **options):
    kernel = run(self, *arguments, grid=grid, warmup=True, **options)
    print(self.__name__, "wgmma" in kernel.asm["ptx"], kernel.metadata.shared < 227 * 1024)

driver.set_active(Driver())
run, JITFunction.run = JITFunction.run, compiled
tile = triton_blocks._Call._tile
triton_blocks._Call._tile = lambda call, **sizes: tile(call, **sizes) | {"EXACT": False}  # as on a GPU
q, k, v = (torch.zeros(1, heads, 64, width, dtype=torch.bfloat16) for heads, width in ((4, 192), (2, 192), (2, 128)))
lists, counts = torch.zeros(1, 2, 1, 1, dtype=torch.int64), torch.ones(1, 2, 1, dtype=torch.int64)
ages = torch.zeros(1, 2, 64, dtype=torch.int64)
selection = (lists, counts, 64, 64, 0.1, torch.zeros(1, 2, 64), ages, ages)
out, lse = triton_blocks._forward(q, k, v, *selection)
triton_blocks._backward(out, q, k, v, out, lse, *selection)
"""


@needs_triton
def test_the_passes_compile_for_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """To its matrix instructions and within its shared memory; the interpreter knows nothing of types."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    passes = ("forward", "query_grads", "key_grads")
    assert done.stdout.splitlines() == [f"{name} True True" for name in passes]
