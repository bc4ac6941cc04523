"""Who computed an arm, as a page says it: true to what attention chooses, and to what could not be measured."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ablations import attention_choosing, attention_language, attention_quality, attention_sparsity
from ablations.attention_hierarchical import STUDY
from bench import attention, block_attention
from bench.attention_sizes import BLOCK_ARMS
from bench.fingerprint import provenance
from bench.indexed_attention import ARMS as INDEXED
from bench.measurement import Measurement, Point, failure, record
from bench.record import Record
from dsv3.attention import implementation, why_not_kernel, why_plain
from dsv3.attention.select import blocks
from dsv3.config import Blocks, Indexer, PerHead, Window
from reports.implementations import (
    BLOCKS,
    INDEXER,
    KERNELS,
    LANGUAGE,
    OURS,
    QUALITY,
    RULED_SINCE,
    SHARED,
    SHORT,
    SPARSITY,
    implementations,
)
from reports.pages import study_page

WHERE = provenance("full")


def kept(arm: str, study: str = STUDY.name, error: str | None = None, **axes: str) -> Record:
    point = Point(study=study, arm=arm, baseline="sdpa", seed=0, axes={"device": "cpu"} | axes)
    if error is not None:
        return failure(point, WHERE, "forward_cpu_ratio", error)
    return record(point, WHERE, Measurement(metric="cpu_seconds", value=1.0))


def test_a_page_says_who_computed_each_arm_and_why_one_was_not() -> None:
    rows = [kept("sdpa"), kept("dense"), kept("hierarchical"), kept("plain"), kept("dense"), kept("flex", error="died")]
    rows.append(kept("best_first", error="pending: there is no C++ compiler"))
    said = implementations(rows)
    assert said == (
        "not computed, there is no C++ compiler: best_first; this project's C++ kernel: dense, hierarchical; "
        "plain PyTorch, as asked: plain; torch's own kernel: sdpa"
    )
    assert ("attention computed by", said) in study_page(STUDY, rows, {}).origin
    assert implementations([kept("dense", device="cuda")]) == "this project's Triton kernel: dense"
    assert implementations([kept("dense", study="moe_capacity")]) == ""


def test_the_case_of_auto_says_what_was_chosen() -> None:
    def said(**axes: str) -> str:
        return implementations([kept("auto", study="bench_attention", dtype="float32", **axes)])

    assert said(implementation="kernel") == "this project's C++ kernel: auto"
    assert said(implementation="dense") == "torch's own kernel: auto"
    assert said(implementation="plain") == "plain PyTorch, for want of a kernel: auto"


def test_the_tables_have_every_arm_of_their_studies() -> None:
    assert BLOCKS.keys() == BLOCK_ARMS.keys()
    assert SPARSITY.keys() == {arm.name for arm in attention_sparsity.STUDY.arms}
    assert BLOCKS.keys() >= {arm.name for arm in attention_choosing.STUDY.arms}
    assert INDEXER.keys() == INDEXED.keys()
    assert LANGUAGE.keys() == attention_language.SELECTS.keys()
    assert QUALITY.keys() == {arm.name for arm in attention_quality.STUDY.arms}


def test_the_tables_say_what_attention_chooses() -> None:
    given = attention.inputs(600)
    reason = why_plain(given.q, attention.choose("per_head_share", given))
    assert KERNELS[SHARED]["cpu"] == f"plain PyTorch, as {reason}"
    assert {arm for arm, words in SPARSITY.items() if words in KERNELS} == set(attention.KERNEL)
    assert {arm for arm, words in BLOCKS.items() if words == OURS} == set(block_attention.KERNEL)
    for table, selects in (
        (QUALITY, attention_quality.selects(attention_quality.LENGTH)),
        (LANGUAGE, attention_language.SELECTS),
    ):
        for arm, select in selects.items():
            assert (table[arm] in KERNELS) == isinstance(select, Blocks | Indexer | PerHead | Window)


def test_windows_that_plain_pytorch_computed_are_not_passed_off_as_the_kernels() -> None:
    old = replace(kept("window", study="attention_quality"), time="2026-11-28T10:00:00+00:00")
    new = replace(old, time=f"{RULED_SINCE}T00:00:00+00:00")
    assert implementations([old]) == "plain PyTorch, as a rule per token thinned out the blocks: window"
    assert implementations([new]) == "this project's C++ kernel: window"
    assert implementations([replace(old, study=STUDY.name)]) == "this project's C++ kernel: window"


def test_short_blocks_are_left_to_plain_pytorch_on_a_gpu_alone() -> None:
    given = attention.inputs(600)
    chosen = blocks(given.q, given.k, Blocks(k=3, block_q=1, block_k=4))
    assert why_plain(given.q, chosen) == why_not_kernel(given.q)
    with FakeTensorMode():
        on_gpu = torch.zeros(1, 2, 600, 8, device="cuda")
    assert KERNELS[SHORT]["cuda"] == f"plain PyTorch, as {why_plain(on_gpu, chosen)}"


@pytest.mark.parametrize("block_k", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_reason_is_given_exactly_where_plain_pytorch_is_chosen(block_k: int, dtype: torch.dtype) -> None:
    q = torch.randn(1, 1, 80, 8, dtype=dtype)
    chosen = blocks(q, q, Blocks(k=4, block_q=16, block_k=block_k))
    biased = replace(chosen, bias=torch.zeros(chosen.indices.shape))
    for selection in (None, biased, chosen):
        assert (why_plain(q, selection) is None) == (implementation(q, selection) != "plain")
    if dtype == torch.float64 and block_k == 16:
        assert why_plain(q, selection) == why_not_kernel(q)
