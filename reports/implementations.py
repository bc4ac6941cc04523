"""Who computed the attention of each arm: torch's own kernel, this project's, or plain PyTorch, and then why.

Arms of these studies name their implementation or leave nothing to choose, so records tell: the device says which of
our kernels it was, a pending record what was missing, and the axis `implementation` what was chosen for `auto`. Those
of quality alone go on without a compiler, in plain PyTorch, which their records do not tell. Tests hold the table
against `dsv3.attention.choice`.
"""

from collections.abc import Mapping, Sequence

from ablations.cell import PENDING
from bench.record import Record

# What stands for what the device has.
OURS, RULED, SHORT = "our kernel", "our kernel, a rule per token in it", "our kernel for short blocks"
SHARED = "single keys that many queries share"
TOO_SHORT = "plain PyTorch, as blocks of keys are too short for a GPU's products"
RULED_SINCE = "2026-11-30"  # until then such a rule went to plain PyTorch; records of that time are kept
BOTH = {"cpu": "this project's C++ kernel", "cuda": "this project's Triton kernel"}
KERNELS = {
    OURS: BOTH,
    RULED: BOTH,
    SHORT: BOTH | {"cuda": TOO_SHORT},
    SHARED: {"cpu": "plain PyTorch, as single keys shared by many queries are gathered once", "cuda": TOO_SHORT},
}
TORCH = "torch's own kernel"
WRITTEN_OUT = "torch's products, the matrix written out"
ASKED = "plain PyTorch, as asked"
CHOSEN = {"kernel": OURS, "triton": OURS, "plain": "plain PyTorch, for want of a kernel", "dense": TORCH}

SPARSITY = {
    "sdpa": TORCH,
    "eager": WRITTEN_OUT,
    **dict.fromkeys(("dense", "blocks_share"), OURS),
    "window": RULED,
    **dict.fromkeys(("per_head_share", "per_head_dropped", "per_head_number"), ASKED),
}
BLOCKS = {
    "sdpa": TORCH,
    "sdpa_fp32": TORCH,
    **dict.fromkeys(("dense", "window", "blocks", "hierarchical", "best_first"), OURS),
    "plain": ASKED,
    "flex": "torch's FlexAttention",
}
QUALITY = {
    "dense": TORCH,
    "window": RULED,
    "per_head": SHARED,
    **dict.fromkeys(("blocks", "hierarchical", "best_first", "indexer"), SHORT),
}
LANGUAGE = {
    "sdpa": TORCH,
    "window": RULED,
    **dict.fromkeys(("dense", "hierarchical", "best_first"), OURS),
}
GPU = {**dict.fromkeys(("sdpa", "flash", "cudnn", "efficient"), TORCH), "hierarchical": OURS}
INDEXER = {"dense": TORCH, **dict.fromkeys(("indexer", "indexer_absorbed"), SHORT)}
STUDIES: Mapping[str, Mapping[str, str]] = {
    "attention_sparsity": SPARSITY,
    "attention_hierarchical": BLOCKS,
    "attention_choosing": BLOCKS,
    "attention_quality": QUALITY,
    "attention_language": LANGUAGE,
    "attention_indexer": INDEXER,
    "attention_gpu": GPU,
}


def implementations(records: Sequence[Record]) -> str:
    """In a line, who computed which arms, and which could not be computed and why; "" where nobody can tell."""
    found: dict[str, list[str]] = {}
    measured = {row.arm for row in records if row.error is None}
    for row in sorted(records, key=lambda row: row.arm):
        words = _words(row)
        if words is not None and row.error is not None:
            missing = row.arm not in measured and row.error.startswith(PENDING)
            words = f"not computed, {row.error.removeprefix(PENDING)}" if missing else None
        if words is not None and row.arm not in found.setdefault(words, []):
            found[words].append(row.arm)
    return "; ".join(f"{words}: {', '.join(arms)}" for words, arms in found.items())


def _words(row: Record) -> str | None:
    if row.arm == "auto":
        words = CHOSEN.get(str(row.axes.get("implementation")))
    elif row.study == "bench_attention" and row.axes.get("phase") != "decode":
        words = (BLOCKS if "dtype" in row.axes else SPARSITY).get(row.arm)
    else:
        words = STUDIES.get(row.study, {}).get(row.arm)
    if words == RULED and row.time < RULED_SINCE:
        return "plain PyTorch, as a rule per token thinned out the blocks"
    return KERNELS[words].get(str(row.axes.get("device")), OURS) if words in KERNELS else words
