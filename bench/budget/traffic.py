"""Bytes that one rank sends in a step, by kind of parallelism, by arithmetic.

Rings: an all-reduce of b bytes over n ranks sends 2 b (n - 1) / n, a reduce-scatter or an all-gather b (n - 1) / n.
P and G are the bytes of the rank's parameters and gradients (experts over dp / ep ranks, the rest over dp), A = e N D
the activations between two blocks of one microbatch, m microbatches:

    data      zero 0: all-reduce G;  1: reduce-scatter G, all-gather P;  2: the same, G for every microbatch;
              3: G and twice P for every microbatch                             (arXiv 1910.02054 section 7)
    tensor    per block two all-reduces of A in forward and two in backward; of the second two, the one into
              attention has the width of what MLA's down-projections made. The embedding's sum and the head's
              gradient, A each. A sequence that is cut sends as much, as all-gather and reduce-scatter
                                                                                (arXiv 1909.08053, 2205.05198)
    pipeline  A to the next stage and A back, for every microbatch              (per rank of a cut sequence A / tp)
    expert    every chosen row out and back, in forward and in backward: 4 e N K D (ep - 1) / ep per layer of experts.
              Rows that share a rank are sent apiece; DeepSeek-V3 sends one row per node, at most 4 of 8, and fp8
              outwards (arXiv 2412.19437 section 3.2.2), less than is counted here

Under DualPipe all of this holds for both stages of a rank, each of which sees half of the microbatches, and the two
ranks that hold a stage average its gradients too.

Scalars (loss, gradient norm, loads of experts) are left out.
"""

from bench.budget.activations import Batch
from bench.budget.splits import Split, check, copies, held, parts_of
from bench.budget.states import Recipe
from dsv3.config import Latent, Model


def sent(model: Model, split: Split, recipe: Recipe, batch: Batch, rank: int) -> dict[str, int]:
    """Bytes that a rank of the pipeline sends in one step, by kind.

    Raises:
        ValueError: for a split that does not come out even.
    """
    check(model, split)
    found = {"data": _data(model, split, recipe, rank), "tensor": 0, "pipeline": 0, "expert": 0}
    for stage in split.stages(rank):
        found["tensor"] += _tensor(model, split, batch, stage)
        found["pipeline"] += _pipeline(model, split, batch, stage)
        found["expert"] += _expert(model, split, batch, stage)
    return found


def ring_all_reduce(size: int, ranks: int) -> int:
    """Bytes that one of `ranks` sends to sum `size` bytes."""
    return 2 * size * (ranks - 1) // ranks


def _data(model: Model, split: Split, recipe: Recipe, rank: int) -> int:
    parameters, alike, m = held(model, split)[rank], copies(split), _microbatches(split)
    total = 0
    for kind, size in parameters.items():
        weights, gradients = recipe.weight * size, recipe.gradient * size
        rounds = {
            0: 2 * gradients,
            1: gradients + weights,
            2: m * gradients + weights,
            3: m * (gradients + 2 * weights),
        }
        total += rounds[split.zero] * (alike[kind] - 1) // alike[kind]
    return total


def _tensor(model: Model, split: Split, batch: Batch, stage: int) -> int:
    widths, here = 0, parts_of(model, split, stage)
    attention, width = model.attention, model.hidden_size
    into = width
    if isinstance(attention, Latent):
        into = attention.kv_lora_rank + attention.qk_rope_head_dim + (attention.q_lora_rank or width)
    for part in here:
        if "." in part:
            widths += 3 * width + into
        if part.startswith("mtp") or part in ("embed_tokens", "head"):
            widths += width
    ring = 2 * (split.tp - 1) / split.tp
    return round(_microbatches(split) * batch.element * batch.tokens * widths * ring)


def _pipeline(model: Model, split: Split, batch: Batch, stage: int) -> int:
    neighbours = (stage > 0) + (stage < split.pp - 1)
    ways = split.tp if split.sequence_parallel else 1
    return _microbatches(split) * neighbours * batch.element * batch.tokens * model.hidden_size // ways


def _expert(model: Model, split: Split, batch: Batch, stage: int) -> int:
    if model.moe is None:
        return 0
    layers = [int(part.partition(".")[2]) for part in parts_of(model, split, stage) if part.startswith("layers.")]
    count = sum(model.is_moe_layer(layer) for layer in layers)
    count += sum(part.startswith("mtp.") for part in parts_of(model, split, stage))
    rows = batch.tokens * model.moe.num_experts_per_tok
    each = 4 * batch.element * rows * model.hidden_size
    return _microbatches(split) * count * each * (split.ep - 1) // split.ep


def _microbatches(split: Split) -> int:
    """Of a step, through one stage of one rank."""
    return split.microbatches // split.twice
