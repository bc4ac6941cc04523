"""The C++ kernel computes what the reference does, for every shape and instruction set, and says where it cannot."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.attention import Selection, attend, implementation, why_not_kernel
from dsv3.attention.kernels import blocks
from dsv3.attention.select import per_head, window
from dsv3.moe.kernels import experts
from dsv3.native import build
from tests.attention.lists import REASON, SHAPES, close, draw, grads, needs_kernel, of_lists, right, select

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
FORMATS = [torch.float32, torch.bfloat16]
KERNEL = (blocks.NAME, Path(blocks.__file__).parent, "attention")


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("c++") is None, reason="kernels are built by c++ on Linux")
def test_where_there_is_a_compiler_both_kernels_are_built() -> None:
    """Without one every test of a kernel is skipped, and so would be the tests of one that does not compile."""
    assert blocks.why_not() is None
    assert experts.why_not() is None


@needs_kernel
@every_shape
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_values_and_gradients_are_those_of_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    leaves, selection = draw(shape, dtype), select(shape)
    ours = attend(*leaves, selection, scale=0.3, implementation="kernel")
    theirs = right(leaves, shape, selection, 0.3)
    # fp32: eps is 1.2e-7, logits of up to 5 keep 5 of them; bf16: weights and results are rounded to 2^-9
    close(ours, theirs, 1e-6 if dtype == torch.float32 else 1e-2)
    for mine, exact in zip(grads(ours, leaves), grads(theirs, leaves), strict=True):
        close(mine, exact, 3e-6 if dtype == torch.float32 else 2e-2)


@needs_kernel
@pytest.mark.parametrize("instructions", ["amx_bf16", "avx512_bf16", "avx512", "avx2", "portable"])
@pytest.mark.parametrize(
    "name", ["60 of 100", "one by one", "many heads far", *(name for name in SHAPES if name.startswith("decoding "))]
)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_each_instruction_set_computes_the_same(instructions: str, name: str, dtype: torch.dtype) -> None:
    if instructions not in blocks.instruction_sets():
        pytest.skip(f"this processor lacks {instructions}")
    shape = SHAPES[name]
    leaves, selection = draw(shape, dtype), select(shape)
    ours = blocks.block_attention(*leaves, selection, scale=0.3, instructions=instructions)
    theirs = right(leaves, shape, selection, 0.3)
    close(ours, theirs, 1e-6 if dtype == torch.float32 else 1e-2)
    for mine, exact in zip(grads(ours, leaves), grads(theirs, leaves), strict=True):
        close(mine, exact, 3e-6 if dtype == torch.float32 else 2e-2)


@needs_kernel
@pytest.mark.parametrize("instructions", ["amx_bf16", "avx512_bf16", "avx512", "avx2", "portable"])
def test_heads_wider_than_bf16_is_widened_at_a_time_are_right(instructions: str) -> None:
    if instructions not in blocks.instruction_sets():
        pytest.skip(f"this processor lacks {instructions}")
    shape = (1, 2, 1, 1, 40, 66, 576, 520, 64, 32)
    leaves, selection = draw(shape, torch.bfloat16), select(shape)
    ours = blocks.block_attention(*leaves, selection, scale=0.03, instructions=instructions)
    theirs = right(leaves, shape, selection, 0.03)
    close(ours, theirs, 1e-2)  # weights, outputs and slopes are rounded to 2^-9, as in the test above
    for mine, exact in zip(grads(ours, leaves), grads(theirs, leaves), strict=True):
        close(mine, exact, 2e-2)


@needs_kernel
@every_shape
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_weights_and_a_rule_per_token_are_those_of_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator, (batch, _, _, shared, queries, total, *_) = torch.Generator().manual_seed(3), shape
    selection = select(shape)
    # a key's rank is its age, so that every query sees itself
    rank = -torch.arange(total).expand(batch, shared, -1)
    reach = torch.randint(0, total, (batch, shared, queries), generator=generator)
    limit = reach - torch.arange(total - queries, total)
    weights = torch.randn(batch, shared, total, generator=generator).requires_grad_()
    ruled = Selection(**{**vars(selection), "rank": rank, "limit": limit, "weights": weights})
    leaves = (*draw(shape, dtype), weights)
    ours = attend(*leaves[:3], ruled, implementation="kernel")
    theirs = right(leaves, shape, ruled, shape[6] ** -0.5)
    close(ours, theirs, 1e-6 if dtype == torch.float32 else 1e-2)
    for mine, exact in zip(grads(ours, leaves), grads(theirs, leaves), strict=True):
        close(mine, exact, 3e-6 if dtype == torch.float32 else 3e-2)


@needs_kernel
@given(st.integers(0, 2**31), st.integers(1, 90), st.integers(0, 90), st.integers(1, 80), st.integers(1, 80))
@settings(max_examples=40)
def test_any_blocks_of_any_sequence_equal_the_plain_path(
    seed: int, queries: int, before: int, block_q: int, block_k: int
) -> None:
    shape = (2, 4, 2, (1, 2, 4)[seed % 3], queries, before + queries, 9, 6, block_q, block_k)
    leaves, selection = draw(shape, seed=seed), select(shape, seed=seed)
    ours, theirs = (attend(*leaves, selection, implementation=name) for name in ("kernel", "plain"))
    close(ours, theirs, 2e-6)
    for mine, other in zip(grads(ours, leaves), grads(theirs, leaves), strict=True):
        close(mine, other, 6e-6)


@needs_kernel
@pytest.mark.parametrize("queries", [1, 300])
@pytest.mark.parametrize(
    ("heads", "groups", "shared", "weighted"),
    [(4, 1, 4, False), (4, 4, 4, False), (134, 2, 1, False), (134, 2, 1, True)],
    ids=["tile by tile", "head by head", "together", "together with weights"],
)
@pytest.mark.parametrize("block_q", [1, 4, 100])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_the_number_of_threads_changes_no_bit(
    heads: int, groups: int, shared: int, weighted: bool, queries: int, block_q: int, dtype: torch.dtype
) -> None:
    total, block_k = 350 if queries > 1 else 1700, 48 if block_q != 4 else 5
    shape = (2 if groups == 4 else 1, heads, groups, shared, queries, total, 20, 32, block_q, block_k)
    leaves, selection, found = draw(shape, dtype), select(shape), []
    if weighted:
        weights = torch.randn(shape[0], shared, total, generator=torch.Generator().manual_seed(1)).requires_grad_()
        leaves, selection = (*leaves, weights), replace(selection, weights=weights)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = attend(*leaves[:3], selection)
            found.append((out, *grads(out, leaves)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@needs_kernel
@pytest.mark.parametrize("cut", [1, 63, 64, 100])
@pytest.mark.parametrize("block", [1, 4, 64])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_no_output_changes_by_a_bit_when_later_tokens_change(cut: int, block: int, dtype: torch.dtype) -> None:
    shape = (2, 2, 2, 2, 200, 200, 16, 16, block, block)
    selection, before = select(shape), draw(shape, dtype)
    after = [x.detach().clone() for x in before]
    for x, other in zip(after, draw(shape, dtype, seed=1), strict=True):
        x[:, :, cut:] = 30 * other.detach()[:, :, cut:]
    one, two = attend(*before, selection), attend(*after, selection)
    assert torch.equal(one[:, :, :cut], two[:, :, :cut])
    assert not torch.equal(one[:, :, cut:], two[:, :, cut:])


@needs_kernel
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_decoding_and_prefill_in_parts_equal_the_whole(dtype: torch.dtype) -> None:
    shape = (2, 4, 2, 2, 150, 150, 16, 16, 1, 16)
    (q, k, v), whole = draw(shape, dtype), select(shape)
    full, parts = attend(q, k, v, whole), []
    for first, stop in ((0, 70), (70, 149), (149, 150)):
        listed = {"indices": whole.indices[:, :, first:stop], "counts": whole.counts[:, :, first:stop]}
        part = Selection(**{**vars(whole), **listed})
        parts.append(attend(q[:, :, first:stop], k[:, :, :stop], v[:, :, :stop], part))
    close(torch.cat(parts, dim=2), full, 1e-6 if dtype == torch.float32 else 2**-8)


@needs_kernel
@pytest.mark.parametrize("queries", [1, 90, 200])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_all_blocks_and_no_selection_are_dense_attention(queries: int, dtype: torch.dtype) -> None:
    shape = (2, 4, 2, 1, queries, 200, 16, 16, 64, 64)
    leaves = draw(shape, dtype)
    for selection in (None, select(shape, keep=1.0)):
        dense = attend(*leaves)
        ours = attend(*leaves, selection, implementation="kernel")
        close(ours, dense, 1e-6 if dtype == torch.float32 else 2e-2)
        for mine, other in zip(grads(ours, leaves), grads(dense, leaves), strict=True):
            close(mine, other, 5e-6 if dtype == torch.float32 else 2e-2)


@needs_kernel
@pytest.mark.parametrize("block_q", [1, 64])
def test_a_chunk_of_scores_after_another_is_rescaled_by_the_larger_maximum(block_q: int) -> None:
    shape = (2, 1, 1, 1, 40, 2600, 16, 16, block_q, 64)
    q, k, v = draw(shape)
    with torch.no_grad():
        k *= torch.linspace(0.1, 2.0, 2600)[:, None]
    everything = select(shape, keep=1.0)
    ours = attend(q, k, v, everything, implementation="kernel")
    close(ours, attend(q.double(), k.double(), v.double()), 1e-6)


@needs_kernel
@pytest.mark.parametrize("heads", [1, 16])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_nan_reaches_the_queries_that_see_it_and_no_other(heads: int, dtype: torch.dtype) -> None:
    shape = (2, heads, 1, 1, 192, 192, 16, 16, 64, 64)
    q, k, v = (x.detach() for x in draw(shape, dtype))
    listed = torch.eye(3, dtype=torch.bool).expand(2, 1, 3, 3).clone()
    listed[:, :, 2, 0] = True  # the third block of queries sees the first block of keys, the second does not
    k[0, :, 40] = float("nan")
    expected = torch.zeros(2, 192, dtype=torch.bool)
    expected[0, 40:64] = expected[0, 128:] = True
    for selection in (of_lists(listed, 64, 64), of_lists(listed.repeat_interleave(64, dim=2), 1, 64)):
        found = attend(q, k, v, selection).isnan().any(-1)
        assert all(torch.equal(one, expected) for one in found.unbind(1))


@needs_kernel
@pytest.mark.parametrize("heads", [1, 16])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_a_single_query_sees_nan_only_in_its_list_and_nothing_in_an_empty_one(heads: int, dtype: torch.dtype) -> None:
    shape = (3, heads, 1, 1, 1, 640, 16, 24, 64, 64)
    q, k, v = (x.detach() for x in draw(shape, dtype))
    listed = torch.ones(3, 1, 1, 10, dtype=torch.bool)
    listed[:, :, :, 7] = False
    listed[2] = False
    k[0, :, 450], k[1, :, 500], v[1, :, 600] = float("nan"), float("nan"), float("nan")
    out = attend(q, k, v, of_lists(listed, 64, 64))
    assert out[0].isfinite().all()
    assert out[1].isnan().all()
    assert not out[2].any()
    k[1], v[1] = 0.0, 1.0
    k[0, :, 130] = float("inf")
    out = attend(q.abs(), k, v, of_lists(listed, 64, 64))
    assert out[0].isnan().all()
    assert (out[1] == 1.0).all()


@needs_kernel
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_a_single_query_of_many_heads_may_see_everything(dtype: torch.dtype) -> None:
    q, k, v = (x.detach() for x in draw((2, 70, 1, 1, 1, 700, 24, 40, 1, 1), dtype))
    ours = attend(q, k, v, implementation="kernel")
    close(ours, attend(q.double(), k.double(), v.double()), 1e-6 if dtype == torch.float32 else 1e-2)


@needs_kernel
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_strides_of_any_kind_are_read_as_they_are(dtype: torch.dtype) -> None:
    shape = (2, 2, 2, 2, 100, 100, 18, 18, 64, 64)
    selection, plain = select(shape), draw(shape, dtype)
    wide = [torch.randn(2, 2, 100, 37).to(dtype)[..., 1::2] for _ in range(3)]  # every second number of odd rows
    odd = [torch.randn(2, 2, 100, 19).to(dtype)[..., 1:] for _ in range(3)]
    whole = attend(*(x.contiguous() for x in plain), selection)
    for views in (wide, odd, [x.detach().mT.contiguous().mT for x in plain]):
        for view, x in zip(views, plain, strict=True):
            view.copy_(x.detach())
        assert torch.equal(attend(*views, selection), whole)


@needs_kernel
def test_a_gradient_that_is_expanded_is_read_right() -> None:
    shape = (2, 2, 2, 2, 100, 100, 16, 16, 64, 64)
    leaves, selection = draw(shape), select(shape)
    ours, theirs = (attend(*leaves, selection, implementation=name) for name in ("kernel", "plain"))
    for mine, other in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (ours, theirs)), strict=True):
        close(mine, other, 3e-6)


@needs_kernel
@pytest.mark.usefixtures("annotations_unchecked")
def test_the_kernel_is_one_operator_to_the_compiler() -> None:
    shape = (2, 2, 2, 2, 100, 100, 16, 16, 64, 64)
    leaves, selection = draw(shape), select(shape)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for chosen in (selection, window(2, 100, 100, size=30)):
        ours, eager = compiled(*leaves, chosen), attend(*leaves, chosen)
        assert torch.equal(ours, eager)
        assert all(torch.equal(one, two) for one, two in zip(grads(ours, leaves), grads(eager, leaves), strict=True))
    weights, bias = (torch.randn(size).requires_grad_() for size in ((2, 2, 100), selection.indices.shape))
    lists = (selection.indices, selection.counts, 64, 64, 0.25, weights, None, None, bias)
    torch.library.opcheck(torch.ops.dsv3_kernels.forward.default, (*leaves, *lists, ""))
    results = [x.detach() for x in torch.ops.dsv3_kernels.forward(*leaves, *lists, "")]
    for added in ((weights.detach(), None, None, bias.detach()), (None,) * 4):
        given = (torch.ones_like(results[0]), *(x.detach() for x in leaves), *results, *lists[:5], *added, "")
        torch.library.opcheck(
            torch.ops.dsv3_kernels.backward.default, given, test_utils=("test_schema", "test_faketensor")
        )


@needs_kernel
def test_autocast_decides_the_format() -> None:
    shape = (2, 2, 2, 2, 100, 100, 16, 16, 64, 64)
    leaves, selection = draw(shape), select(shape)
    with torch.autocast("cpu", torch.bfloat16):
        assert implementation(leaves[0].double(), selection) == "kernel"
        out = attend(*leaves, selection)
    assert out.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in grads(out, leaves))


@needs_kernel
def test_there_is_no_second_derivative() -> None:
    shape = (2, 1, 1, 1, 10, 10, 16, 16, 64, 64)
    leaves, selection = draw(shape), select(shape)
    (grad,) = torch.autograd.grad(attend(*leaves, selection).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_the_kernel_is_chosen_unless_many_queries_share_single_keys() -> None:
    q, importance = torch.zeros(1, 2, 100, 8), torch.zeros(1, 2, 100)
    assert implementation(q, window(1, 100, 100, size=5)) == ("kernel" if REASON is None else "plain")
    assert implementation(q[:, :, :4], per_head(importance, 4, k=5)) == ("kernel" if REASON is None else "plain")
    for block_q, block_k in ((64, 16), (64, 3), (1, 1)):
        whole = select((1, 2, 2, 2, 100, 100, 8, 8, block_q, block_k))
        assert implementation(q, whole) == ("kernel" if REASON is None else "plain")
    assert implementation(q[:, :, :5], per_head(importance, 5, k=5)) == implementation(q, None) == "plain"
    assert implementation(q.double(), whole) == "plain"
    assert implementation(q.to("meta"), whole) == "plain"


@pytest.mark.usefixtures("annotations_unchecked")
def test_what_the_kernel_cannot_compute_is_refused_by_name() -> None:
    q = torch.zeros(1, 1, 4, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="implementation='kernel': cannot be used here: it computes in float32 or"):
        attend(q, q, q, implementation="kernel")
    with pytest.raises(ValueError, match="implementation='fast': must be one of kernel, triton, plain"):
        attend(q, q, q, implementation="fast")  # type: ignore[arg-type]
    assert why_not_kernel(q.to("meta")) == "it runs on a CPU, not on meta"


def test_a_machine_without_a_compiler_says_so_once_and_computes_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    missing = build.why_not.__wrapped__(*KERNEL)
    assert missing is not None
    assert missing.startswith("there is no C++ compiler; install g++")
    assert capsys.readouterr().err == f"dsv3: attention without the C++ kernel: {missing}\n"
    monkeypatch.setattr(blocks, "_prepared", lambda: missing)
    shape = (2, 2, 2, 2, 20, 20, 8, 8, 64, 64)
    leaves, selection = draw(shape), select(shape)
    assert implementation(leaves[0], selection) == "plain"
    close(attend(*leaves, selection), right(leaves, shape, selection, 8**-0.5), 1e-6)
    with pytest.raises(RuntimeError, match="the C\\+\\+ kernel of attention is not at hand: there is no C"):
        blocks.block_attention(*leaves, selection, scale=1.0)


@needs_kernel
def test_a_compiler_that_goes_through_another_is_used_with_a_ninja_beside_python(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Up to compiling itself: CXX="ccache g++" is common, and an environment's folder need not be on PATH."""
    monkeypatch.setenv("CXX", "env c++")
    assert build._digest(["env", "c++"], *KERNEL[:2]) == build._digest(["c++"], *KERNEL[:2])
    tools, beside = tmp_path / "tools", tmp_path / "bin"
    for folder, program in ((tools, "env"), (beside, "ninja")):
        folder.mkdir()
        (folder / program).symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(build, "_digest", lambda compiler, *_: "-".join(compiler).replace("/", "-"))
    monkeypatch.setattr(build, "_root", lambda: tmp_path / "cache")
    found: list[str | None] = []

    def compiled(folder: Path, *_: object) -> None:
        folder.mkdir()
        found.extend((folder.name, shutil.which("ninja")))

    monkeypatch.setattr(build, "_compile", compiled)
    monkeypatch.setattr(torch.ops, "load_library", lambda library: None)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(RuntimeError, match="ninja is missing"):
        build._load(*KERNEL)
    monkeypatch.setattr(sys, "executable", str(beside / "python"))
    build._load(*KERNEL)
    assert found == ["env-c++", str(beside / "ninja")]
    assert os.environ["PATH"] == str(tools)


def test_a_compiler_that_fails_is_no_error_of_the_user(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: object
) -> None:
    monkeypatch.setenv("CXX", "false")
    assert build.why_not.__wrapped__(*KERNEL) is not None
    assert "without the C++ kernel" in capsys.readouterr().err
