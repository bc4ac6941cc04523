"""What a model costs, by arithmetic on its config alone: parameters, floating-point operations, bytes of cache. No
torch.

Everything follows from one table: the name and shape of each parameter, as `Transformer` has them (a test holds the
two together).

Conventions, where papers and tools differ:
  - a multiply-add is 2 FLOPs; only matrix products count. Norms, softmax, SiLU, rotation and the adding of residuals
    do not: they are O(width) where products are O(width^2). The embedding is a look-up and costs none; the head
    counts, tied or not; so does the router.
  - a token's products with a weight [in, out] cost 2 in out; routed experts count K of E times, whatever the load and
    the capacity.
  - attention counts the keys that a query must look at, its own included: t + 1 of them at position t when all are
    visible, (T + 1) / 2 on average. A kernel that computes masked pairs too does more than is counted here.
  - choosing keys by content costs the scores that decide (`dsv3.model.choosing`), and nothing in the backward pass: a
    choice has no gradient. A per-head choice costs its linear map. An indexer's inputs are detached; its loss counts.
    What a choice of blocks learns by counts as `dsv3.model.choosing` says, its loss as an indexer's.
  - the backward pass costs twice the forward pass (a product with respect to its input, one with respect to its
    weight); recomputation is not counted.
  - depth m of multi-token prediction runs on T - m positions and pays for the shared head once more.
Under these, DeepSeek-V3 trains at 250.5 GFLOP per token at length 4096 without its MTP module; its authors' throughput
implies 249.7 (arXiv 2505.09343, table 4).
"""

from math import prod
from typing import TypeVar, assert_never

from dsv3.config import (
    Attention,
    Blocks,
    Everything,
    Grouped,
    Indexer,
    Latent,
    Model,
    MultiHead,
    PerHead,
    Select,
    Window,
)
from dsv3.model.choosing import decoding_flops, learning_flops, selection_flops, teaching_flops

Shapes = dict[str, tuple[int, ...]]
Of = TypeVar("Of")

BACKWARD_OVER_FORWARD = 2


def parameter_shapes(model: Model, *, mtp: bool = True) -> Shapes:
    """The shape of every parameter by its name in `Transformer`; shared parameters (a tied head, MTP's embedding and
    head) appear once.
    """
    width = model.hidden_size
    shapes: Shapes = {"embed_tokens.weight": (model.vocab_size, width)}
    for layer in range(model.num_hidden_layers):
        shapes |= _within(f"layers.{layer}", _block_shapes(model, layer))
    shapes["norm.weight"] = (width,)
    if not model.tie_word_embeddings:
        shapes["lm_head.weight"] = (model.vocab_size, width)
    for depth in range(mtp_depths(model) if mtp else 0):
        shapes |= _within(f"mtp.{depth}", _mtp_shapes(model, depth))
    return shapes


def parameters(model: Model, *, within: str = "", mtp: bool = True) -> int:
    """How many parameters the module of that path has (all of them by default), e.g. `within="layers.3.self_attn"`."""
    return sum(prod(shape) for name, shape in parameter_shapes(model, mtp=mtp).items() if _inside(name, within))


def active_parameters(model: Model, *, embedding: bool = True, mtp: bool = True) -> int:
    """Parameters that one token passes through: K of the E routed experts, everything else; `embedding=False` leaves
    out the look-up table.

    A tied table is also the head, so it stays.
    """
    shapes = parameter_shapes(model, mtp=mtp)
    if not embedding and not model.tie_word_embeddings:
        del shapes["embed_tokens.weight"]
    return sum(_active(model, name, shape) for name, shape in shapes.items())


def forward_flops(model: Model, length: int, *, mtp: bool = True) -> dict[str, int]:
    """FLOPs of one forward pass over one sequence of `length` tokens, by parameter name, by `...self_attn.scores` for
    what attention adds, by `...self_attn.selection.scores` or `...self_attn.indexer.scores` for choosing its keys, and
    by `...self_attn.learning.scores` or `...self_attn.branch.scores` for what a choice of blocks learns by.
    """
    flops: dict[str, int] = {}
    for name, shape in parameter_shapes(model, mtp=mtp).items():
        if len(shape) > 1 and name != "embed_tokens.weight":
            flops[name] = 2 * _active(model, name, shape) * _positions(name, length)
    head, scores = 2 * model.vocab_size * model.hidden_size, _scores(model.attention, length)
    flops["lm_head.weight"] = head * length
    for layer in range(model.num_hidden_layers):
        flops |= _within(f"layers.{layer}.self_attn", scores)
    for depth in range(mtp_depths(model) if mtp else 0):
        positions = length - depth - 1
        flops |= _within(f"mtp.{depth}.block.self_attn", _scores(model.attention, positions))
        flops[f"mtp.{depth}.lm_head.weight"] = head * positions
    return flops


def flops_per_token(model: Model, length: int, *, training: bool = False, mtp: bool = True) -> float:
    """FLOPs per token of a sequence of `length` tokens, forward, or forward and backward when `training`, in which the
    loss of an indexer, or of a choice that is distilled, is computed too.
    """
    flops = forward_flops(model, length, mtp=mtp)
    if not training:
        return sum(flops.values()) / length
    learning = model.num_hidden_layers * distillation_flops(model.attention, length)
    for depth in range(mtp_depths(model) if mtp else 0):
        learning += distillation_flops(model.attention, length - depth - 1)
    return (sum(_passes(model.attention.select, name) * value for name, value in flops.items()) + learning) / length


def decode_flops(model: Model, visible: int, *, absorbed: bool = True) -> int:
    """FLOPs of decoding one token that sees `visible` positions, its own included, from a cache; multi-token
    prediction is skipped.

    `absorbed` prices MLA in its decoding form, in which kv_b_proj acts on the query and the output rather than on
    every cached latent. Expanded, all visible latents go through kv_b_proj anew.
    """
    products = sum(
        2 * _active(model, name, shape)
        for name, shape in parameter_shapes(model, mtp=False).items()
        if len(shape) > 1 and name != "embed_tokens.weight"
    )
    if model.tie_word_embeddings:
        products += 2 * model.vocab_size * model.hidden_size
    attention = model.attention
    per_layer = 2 * _kept(attention.select, visible) * macs_per_pair(attention, absorbed=absorbed)
    if isinstance(attention.select, Indexer):
        per_layer += index_flops(attention.select, visible, visible)
    if isinstance(attention, Latent) and not absorbed:
        kv_b = (
            attention.num_attention_heads * (attention.qk_nope_head_dim + attention.v_head_dim) * attention.kv_lora_rank
        )
        per_layer += 2 * kv_b * (visible - 1)
    return products + model.num_hidden_layers * (per_layer + decoding_flops(attention, visible))


def attention_flops(attention: Attention, length: int) -> int:
    """FLOPs of q k^T and of the weighted sum of values in one layer, over one sequence, beside the projections."""
    return 2 * kept_pairs(attention.select, length) * macs_per_pair(attention)


def index_flops(select: Indexer, first: int, last: int) -> int:
    """FLOPs of an indexer's scores for queries that may see `first`, `first` + 1, ... `last` keys.

    A score of a pair is a product per index head and their weighted sum; a query that sees all keys needs none.
    """
    if select.stage == "warmup":
        return 0

    def pairs(visible: int) -> int:
        return visible * (visible + 1) // 2

    least = max(first - 1, select.index_topk)
    return 2 * max(0, pairs(last) - pairs(least)) * select.index_n_heads * (select.index_head_dim + 1)


def distillation_flops(attention: Attention, length: int) -> int:
    """FLOPs of the loss of an indexer or of a distilled choice of blocks in one layer, over one sequence: the logits of
    attention once more, forward, and the scores that learn forward and backward, of all keys or past blocks seen.
    """
    select = attention.select
    if isinstance(select, Blocks):
        logits, scores = teaching_flops(attention, length)
        return logits + (1 + BACKWARD_OVER_FORWARD) * scores
    if not isinstance(attention, Latent) or not isinstance(select, Indexer) or select.loss_weight == 0:
        return 0
    teacher = attention.num_attention_heads * attention.qk_head_dim
    learner = select.index_n_heads * (select.index_head_dim + 1)
    return 2 * kept_pairs(select, length) * (teacher + (1 + BACKWARD_OVER_FORWARD) * learner)


def macs_per_pair(attention: Attention, *, absorbed: bool = False) -> int:
    """Multiply-adds that one query and one key cost in all heads: the score and the weighted value."""
    heads = attention.num_attention_heads
    match attention:
        case Latent():
            rank, rope = attention.kv_lora_rank, attention.qk_rope_head_dim
            expanded = attention.qk_head_dim + attention.v_head_dim
            return heads * (rank + rope + rank if absorbed else expanded)
        case MultiHead() | Grouped():
            return heads * 2 * attention.head_dim
        case _:
            assert_never(attention)


def kept_pairs(select: Select, length: int) -> int:
    """Pairs of a query and a key that one head computes over a causal sequence of `length` tokens; with `top_p` or
    entmax, at most.
    """
    full = _kept(select, length)
    if full == length or isinstance(select, Window | Indexer) or (isinstance(select, PerHead) and select.keep is None):
        return full * (full + 1) // 2 + (length - full) * full  # every visible key until `full` are seen, then so many
    return sum(_kept(select, visible) for visible in range(1, length + 1))


def kv_values_per_token(attention: Attention) -> int:
    """Numbers that one layer caches per token; a per-head selection remembers each token's importance besides, an
    indexer its key.

    The index of a choice by blocks and the means of a branch are not numbers per token: `KeyValueCache.nbytes` counts
    them.
    """
    importance = attention.num_attention_heads if isinstance(attention.select, PerHead) else 0
    match attention:
        case Latent():
            index_key = attention.select.index_head_dim if isinstance(attention.select, Indexer) else 0
            return attention.kv_lora_rank + attention.qk_rope_head_dim + importance + index_key
        case Grouped() | MultiHead():
            return 2 * _key_value_heads(attention) * attention.head_dim + importance
        case _:
            assert_never(attention)


def kv_bytes_per_token(model: Model, *, bytes_per_value: int = 2) -> int:
    """Bytes that all layers cache per token, in bf16 unless told otherwise; multi-token prediction caches nothing, as
    it is skipped in decoding.
    """
    return model.num_hidden_layers * kv_values_per_token(model.attention) * bytes_per_value


def mtp_depths(model: Model) -> int:
    """How many tokens beyond the next one the model predicts."""
    return 0 if model.mtp is None else model.mtp.num_nextn_predict_layers


def _passes(select: Select, name: str) -> int:
    """How often training pays for a product: a choice has no gradient, an indexer none for its inputs, and beside one
    that warms up nothing else learns.
    """
    if name.endswith((".selection.scores", ".indexer.scores")):
        return 1
    if isinstance(select, Indexer) and ".indexer." in name:
        return 2 if select.loss_weight > 0 else 1
    frozen = isinstance(select, Indexer) and select.stage == "warmup"
    return 1 if frozen else 1 + BACKWARD_OVER_FORWARD


def _scores(attention: Attention, length: int) -> dict[str, int]:
    scores = {"scores": attention_flops(attention, length)}
    if isinstance(attention.select, Blocks):
        scores["selection.scores"] = selection_flops(attention, length)
    if isinstance(attention.select, Indexer):
        scores["indexer.scores"] = index_flops(attention.select, 1, length)
    return scores | learning_flops(attention, length)


def _kept(select: Select, visible: int) -> int:
    match select:
        case Everything():
            return visible
        case Window():
            return min(visible, select.size + select.sink)
        case PerHead():
            if select.keep is not None:
                return max(1, int(select.keep * visible))
            assert select.k is not None, "PerHead has keep or k"
            return min(visible, select.k)
        case Indexer():
            return min(visible, select.index_topk) if select.stage == "sparse" else visible
        case Blocks():
            # the blocks that end before the query's own block of queries, then everything up to the query itself
            complete = (visible - 1) // select.block_q * select.block_q // select.block_k
            return visible - (complete - select.past(complete)) * select.block_k
        case _:
            assert_never(select)


def _positions(name: str, length: int) -> int:
    module, _, rest = name.partition(".")
    return length - int(rest.partition(".")[0]) - 1 if module == "mtp" else length


def _active(model: Model, name: str, shape: tuple[int, ...]) -> int:
    if ".mlp.experts." not in name:
        return prod(shape)
    assert model.moe is not None, "a name with experts comes from a model with experts"
    return model.moe.num_experts_per_tok * prod(shape[1:])


def _block_shapes(model: Model, layer: int) -> Shapes:
    norms = {"input_layernorm.weight": (model.hidden_size,), "post_attention_layernorm.weight": (model.hidden_size,)}
    feed_forward = (
        _moe_shapes(model) if model.is_moe_layer(layer) else _swiglu_shapes(model.hidden_size, model.intermediate_size)
    )
    return norms | _within("self_attn", _attention_shapes(model)) | _within("mlp", feed_forward)


def _mtp_shapes(model: Model, depth: int) -> Shapes:
    width = model.hidden_size
    norms = {f"{name}.weight": (width,) for name in ("enorm", "hnorm", "norm")}
    block = _within("block", _block_shapes(model, model.num_hidden_layers + depth))
    return norms | {"eh_proj.weight": (width, 2 * width)} | block


def _attention_shapes(model: Model) -> Shapes:
    width, attention = model.hidden_size, model.attention
    match attention:
        case Latent():
            shapes = _latent_shapes(width, attention)
        case MultiHead() | Grouped():
            queries = attention.num_attention_heads * attention.head_dim
            keys = _key_value_heads(attention) * attention.head_dim
            shapes = {
                "q_proj.weight": (queries, width),
                "k_proj.weight": (keys, width),
                "v_proj.weight": (keys, width),
                "o_proj.weight": (width, queries),
            }
        case _:
            assert_never(attention)
    if isinstance(attention.select, PerHead):
        shapes["importance.proj.weight"] = (attention.num_attention_heads, width)
    if isinstance(attention.select, Blocks) and attention.select.learns == "branch":
        shapes["gates.weight"] = (2 * attention.num_attention_heads, width)
    return shapes


def _latent_shapes(width: int, attention: Latent) -> Shapes:
    heads, rank = attention.num_attention_heads, attention.kv_lora_rank
    queries = heads * attention.qk_head_dim
    if attention.q_lora_rank is None:
        shapes: Shapes = {"q_proj.weight": (queries, width)}
    else:
        shapes = {
            "q_a_proj.weight": (attention.q_lora_rank, width),
            "q_a_layernorm.weight": (attention.q_lora_rank,),
            "q_b_proj.weight": (queries, attention.q_lora_rank),
        }
    if isinstance(attention.select, Indexer) and attention.q_lora_rank is not None:
        shapes |= _within("indexer", _indexer_shapes(width, attention.q_lora_rank, attention.select))
    return shapes | {
        "kv_a_proj_with_mqa.weight": (rank + attention.qk_rope_head_dim, width),
        "kv_a_layernorm.weight": (rank,),
        "kv_b_proj.weight": (heads * (attention.qk_nope_head_dim + attention.v_head_dim), rank),
        "o_proj.weight": (width, heads * attention.v_head_dim),
    }


def _indexer_shapes(width: int, rank: int, select: Indexer) -> Shapes:
    heads, inner = select.index_n_heads, select.index_head_dim
    return {
        "wq_b.weight": (heads * inner, rank),
        "wk.weight": (inner, width),
        "k_norm.weight": (inner,),
        "k_norm.bias": (inner,),
        "weights_proj.weight": (heads, width),
    }


def _moe_shapes(model: Model) -> Shapes:
    moe, width = model.moe, model.hidden_size
    assert moe is not None, "only a model with experts has an expert layer"
    experts, inner = moe.n_routed_experts, moe.moe_intermediate_size
    shapes: Shapes = {
        "gate.weight": (experts, width),
        "experts.gate_up": (experts, width, 2 * inner),
        "experts.down": (experts, inner, width),
    }
    if moe.n_shared_experts:
        shapes |= _within("shared_experts", _swiglu_shapes(width, moe.n_shared_experts * inner))
    return shapes


def _swiglu_shapes(width: int, inner: int) -> Shapes:
    return {"gate_proj.weight": (inner, width), "up_proj.weight": (inner, width), "down_proj.weight": (width, inner)}


def _key_value_heads(attention: MultiHead | Grouped) -> int:
    return attention.num_key_value_heads if isinstance(attention, Grouped) else attention.num_attention_heads


def _within(path: str, of: dict[str, Of]) -> dict[str, Of]:
    return {f"{path}.{name}": value for name, value in of.items()}


def _inside(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(path + ".")
