"""Bytes that forward keeps for backward, by arithmetic: module by module, for each recomputation policy. No torch.

Counted is what autograd keeps of this project's eager modules, storage by storage, each once however many views of it
are saved; parameters are not. e is the bytes of an activation (2 in bf16, 4 in fp32), N = B T tokens, M = N K rows of
experts, W = max(P, R) the width that the CPU's fused attention pads queries, keys and values to.

    RMSNorm of width w   its input in fp32, 4 N w; the rate of each row, 4 N; the quotient, e N w
    a linear layer       its input (once, where several layers read the same)
    rotation             the turn of each pair, 4 B a position and channel, once for queries and once for keys
    attention            q, k, v, out: e each; the logarithm of each row's denominator, 4 N H
    SwiGLU of width F    gate, up, silu(gate), and the product that the next layer reads: 4 e N F
    router               x and W in fp32, scores, chosen indices and weights
    experts, bf16        grouped_mm: gathered rows e M D, gate and up 2 e M F, silu, product, weighted product 3 e M F,
                         and the rows of the sum in fp32, 4 M D
    experts, fp32        the loop of `dsv3.moe.looped`: gate and up, 2 e M F, and the gathers' indices
    loss                 log-probabilities in fp32, 4 N V, for the head and for each MTP depth
    a selection of keys  q, k, v and out without padding, out once more for the layer that reads it, 8 B for each number
                         of `selections`, and for per-head selection an importance e N H. Choosing by content has no
                         gradient and keeps no score; an indexer that learns keeps what its own loss needs

Policies:

    none        everything above
    selective   within a block what is left are its input and the outputs of matrix products, but not of MLA's
                up-projections (q_b_proj, kv_b_proj) and of the last product of a feed-forward network, and the
                output of attention: norms, up-projections, rotation, SwiGLU and the choice of keys run again in
                backward, as DeepSeek-V3 does (arXiv 2412.19437 sections 3.2.3 and 3.3.3)
    full        within a block its input alone; the block's forward runs again

A capacity is counted as dropping nothing: how much it drops hangs on the routing. Experts that choose are refused, and
a capacity that sends tokens on. An indexer that learns keeps under a policy what the policy says; torch's own
checkpointing runs its block at once, since the loss is differentiated while it is computed, and keeps the whole of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, assert_never

from bench.budget.selections import chooses, listed
from dsv3.config import (
    Attention,
    CentredSignBias,
    Dropless,
    ExpertChoice,
    Grouped,
    Indexer,
    Latent,
    Model,
    PerHead,
    ProportionalBias,
    QuadraticLoss,
    QuantileBias,
    SequenceLoss,
    SignBias,
    SimilarityLoss,
    SwitchLoss,
    ZLoss,
)
from dsv3.model.cost import forward_flops, mtp_depths

Policy = Literal["none", "selective", "full"]
POLICIES: tuple[Policy, ...] = ("none", "selective", "full")
Axis = Literal["tokens", "width", "rows"]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes that one module keeps; `axis` is what tensor parallelism could divide: the tokens (only where the sequence
    is split too), the inner width or heads, or nothing (rows gathered for experts).
    """

    module: str
    bytes: int
    axis: Axis


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The tokens of one forward pass, and the bytes of an activation."""

    sequences: int
    length: int
    element: int

    @property
    def tokens(self) -> int:
        """N."""
        return self.sequences * self.length

    def shorter(self, by: int) -> "Batch":
        """The same rows without `by` of their tokens."""
        return Batch(sequences=self.sequences, length=self.length - by, element=self.element)


def kept(model: Model, batch: Batch, policy: Policy = "none") -> dict[str, tuple[Kept, ...]]:
    """What each part keeps: "embed_tokens", "layers.<i>", "mtp.<m>" and "head" (final norm, head and loss)."""
    parts: dict[str, tuple[Kept, ...]] = {}
    parts["embed_tokens"] = (Kept(module="embedding", bytes=8 * (batch.tokens + batch.sequences), axis="tokens"),)
    for layer in range(model.num_hidden_layers):
        parts[f"layers.{layer}"] = tuple(block(model, layer, batch, policy))
    parts["head"] = (*_head(model, batch), *_balance(model, batch, policy, _moe_layers(model)))
    for depth in range(mtp_depths(model)):
        shorter = batch.shorter(depth + 1)
        inner = block(model, model.num_hidden_layers + depth, shorter, policy)
        last = (*_head(model, shorter), *_balance(model, shorter, policy, 1))
        parts[f"mtp.{depth}"] = (*_mtp(model, shorter), *inner, *last)
    return parts


def kept_bytes(model: Model, batch: Batch, policy: Policy = "none") -> int:
    """The sum over all parts."""
    return sum(item.bytes for part in kept(model, batch, policy).values() for item in part)


def by_module(parts: dict[str, tuple[Kept, ...]]) -> dict[str, int]:
    """Bytes summed over layers, by module."""
    found: dict[str, int] = {}
    for part in parts.values():
        for item in part:
            found[item.module] = found.get(item.module, 0) + item.bytes
    return found


def block(model: Model, layer: int, batch: Batch, policy: Policy) -> Iterator[Kept]:
    """One block under a policy."""
    moe = model.is_moe_layer(layer)
    match policy:
        case "none":
            yield from _norm("norms", model.hidden_size, batch)
            yield from _attention(model, batch)
            yield from _norm("norms", model.hidden_size, batch)
            yield from _experts(model, batch) if moe else _swiglu("dense", model, batch, model.intermediate_size)
        case "selective":
            yield Kept(module="block inputs", bytes=batch.element * batch.tokens * model.hidden_size, axis="tokens")
            yield from _products_of_attention(model, batch)
            yield from _products_of_experts(model, batch) if moe else _gate_up("dense", batch, model.intermediate_size)
        case "full":
            yield Kept(module="block inputs", bytes=batch.element * batch.tokens * model.hidden_size, axis="tokens")
        case _:
            assert_never(policy)


def _norm(module: str, width: int, batch: Batch, *, stored: int | None = None) -> Iterator[Kept]:
    """`stored`: the width of the storage that an fp32 input lies in, where it is a part of a wider one."""
    held = width if stored is None or batch.element < 4 else stored
    yield Kept(module=module, bytes=batch.tokens * (4 * held + 4 + batch.element * width), axis="tokens")


def _attention(model: Model, batch: Batch) -> Iterator[Kept]:
    attention, e, n = model.attention, batch.element, batch.tokens
    yield Kept(module="attention", bytes=e * n * model.hidden_size, axis="tokens")
    if isinstance(attention, Latent):
        yield from _latents(attention, batch)
    yield Kept(module="attention", bytes=e * n * sum(core_widths(model, batch)), axis="width")
    rotated = attention.qk_rope_head_dim if isinstance(attention, Latent) else attention.head_dim
    yield Kept(module="attention", bytes=2 * 4 * batch.length * rotated, axis="rows")
    yield Kept(module="attention", bytes=4 * n * attention.num_attention_heads, axis="width")
    yield from _selection(attention, batch)
    if isinstance(attention.select, Indexer) and attention.select.loss_weight > 0:
        yield from _indexer(attention.select, rotated, model.hidden_size, batch)


def _latents(attention: Latent, batch: Batch) -> Iterator[Kept]:
    rank, rope = attention.kv_lora_rank, attention.qk_rope_head_dim
    if attention.q_lora_rank is not None:
        yield from _norm("attention", attention.q_lora_rank, batch)
        yield Kept(module="attention", bytes=batch.element * batch.tokens * attention.q_lora_rank, axis="tokens")
    yield from _norm("attention", rank, batch, stored=rank + rope)
    yield Kept(module="attention", bytes=batch.element * batch.tokens * (rank + rope), axis="tokens")


def core_widths(model: Model, batch: Batch) -> tuple[int, ...]:
    """Numbers per token of q, k, v, out, and of the output layer's input where that is not `out` itself."""
    attention, heads = model.attention, model.attention.num_attention_heads
    selected = chooses(attention.select, batch.length)
    if isinstance(attention, Latent):
        p, r = attention.qk_head_dim, attention.v_head_dim
        padded = p if selected else max(p, r)
        # narrower values are padded into a storage of their own; else they are a view of what kv_b_proj wrote
        values = padded if p > r and not selected else attention.qk_nope_head_dim + r
        out = r if selected else padded
        return heads * padded, heads * padded, heads * values, heads * out, heads * r
    groups = attention.num_key_value_heads if isinstance(attention, Grouped) else heads
    p = attention.head_dim
    return heads * p, groups * p, groups * p, heads * p, heads * p if selected else 0


def _selection(attention: Attention, batch: Batch) -> Iterator[Kept]:
    numbers, per_head = listed(attention, batch.sequences, batch.length)
    scored = attention.num_attention_heads if isinstance(attention.select, PerHead) else 0
    size = 8 * numbers + batch.element * batch.tokens * scored
    if size:
        yield Kept(module="selection", bytes=size, axis="width" if per_head else "rows")


def _indexer(indexer: Indexer, rotated: int, width: int, batch: Batch) -> Iterator[Kept]:
    """The turns of its queries and keys; the input of its weights in fp32; what LayerNorm reads, and both statistics;
    and, in place of what its loss reads, the gradients of that in fp32: queries, keys and weights.
    """
    e, n = batch.element, batch.tokens
    copied = 4 * width if e < 4 else 0
    normed = e * (indexer.index_head_dim + 2)
    yield Kept(module="indexer", bytes=2 * 4 * batch.length * rotated, axis="rows")
    yield Kept(module="indexer", bytes=n * (copied + normed + _indexer_gives(indexer, 4)), axis="tokens")


def _indexer_gives(indexer: Indexer, element: int) -> int:
    """Bytes a token of its queries and its key, `element` each, and its weights in fp32."""
    heads, width = indexer.index_n_heads, indexer.index_head_dim
    return element * (heads + 1) * width + 4 * heads


def _swiglu(module: str, model: Model, batch: Batch, inner: int) -> Iterator[Kept]:
    yield Kept(module=module, bytes=batch.element * batch.tokens * model.hidden_size, axis="tokens")
    yield Kept(module=module, bytes=4 * batch.element * batch.tokens * inner, axis="width")


def _experts(model: Model, batch: Batch) -> Iterator[Kept]:
    moe, e, n, width = model.moe, batch.element, batch.tokens, model.hidden_size
    assert moe is not None, "a layer with experts comes from a model with experts"
    half = e < 4
    copies = 4 * (moe.n_routed_experts * width + n * width) if half else 0
    weighed = 4 * n * (1 + moe.num_experts_per_tok) if moe.norm_topk_prob else 0
    scored = n * (4 * moe.n_routed_experts + 8 * moe.num_experts_per_tok)
    yield Kept(module="router", bytes=copies + weighed + scored, axis="tokens")
    rows, inner = n * moe.num_experts_per_tok, moe.moe_intermediate_size
    if half:
        yield Kept(module="experts", bytes=rows * (16 + e + (e + 4) * width) + 4 * moe.n_routed_experts, axis="rows")
        yield Kept(module="experts", bytes=5 * e * rows * inner, axis="width")
    else:
        yield Kept(module="experts", bytes=rows * (16 + e) + 8 * moe.n_routed_experts, axis="rows")
        yield Kept(module="experts", bytes=2 * e * rows * inner, axis="width")
    if moe.n_shared_experts:
        yield from _swiglu("shared experts", model, batch, moe.n_shared_experts * inner)
    elif not half:
        yield Kept(module="router", bytes=e * n * width, axis="tokens")


def _products_of_attention(model: Model, batch: Batch) -> Iterator[Kept]:
    attention, e, n = model.attention, batch.element, batch.tokens
    heads = attention.num_attention_heads
    if isinstance(attention, Latent):
        rank = attention.q_lora_rank
        down = attention.kv_lora_rank + attention.qk_rope_head_dim + (0 if rank is None else rank)
        wide = heads * attention.qk_head_dim if rank is None else 0
        out = heads * max(attention.qk_head_dim, attention.v_head_dim)
    else:
        groups = attention.num_key_value_heads if isinstance(attention, Grouped) else heads
        down, wide, out = 0, (heads + 2 * groups) * attention.head_dim, heads * attention.head_dim
    yield Kept(module="attention", bytes=e * n * (down + model.hidden_size), axis="tokens")
    yield Kept(module="attention", bytes=n * (e * (wide + out) + 4 * heads), axis="width")
    if isinstance(attention.select, Indexer):
        yield Kept(module="indexer", bytes=n * _indexer_gives(attention.select, e), axis="tokens")


def _gate_up(module: str, batch: Batch, inner: int) -> Iterator[Kept]:
    yield Kept(module=module, bytes=2 * batch.element * batch.tokens * inner, axis="width")


def _products_of_experts(model: Model, batch: Batch) -> Iterator[Kept]:
    moe = model.moe
    assert moe is not None, "a layer with experts comes from a model with experts"
    inner = moe.moe_intermediate_size
    yield Kept(module="router", bytes=4 * batch.tokens * moe.n_routed_experts, axis="tokens")
    rows = batch.tokens * moe.num_experts_per_tok
    yield Kept(module="experts", bytes=2 * batch.element * rows * inner, axis="width")
    if batch.element == 4:  # the loop is one operator: its sum is kept with what its backward needs
        yield Kept(module="experts", bytes=4 * batch.tokens * model.hidden_size, axis="tokens")
    if moe.n_shared_experts:
        yield from _gate_up("shared experts", batch, moe.n_shared_experts * inner)


def _head(model: Model, batch: Batch) -> Iterator[Kept]:
    """The last norm, what the head reads, log-probabilities and targets."""
    yield from _norm("norms", model.hidden_size, batch)
    yield Kept(module="head", bytes=batch.element * batch.tokens * model.hidden_size, axis="tokens")
    yield Kept(module="loss", bytes=4 * batch.tokens * model.vocab_size, axis="width")
    copied = 8 * batch.tokens if batch.sequences > 1 else 0  # one row is a view of what the embedding read
    yield Kept(module="loss", bytes=copied, axis="tokens")


def _mtp(model: Model, batch: Batch) -> Iterator[Kept]:
    """Both norms before the joining layer, whose inputs in fp32 lie in storages already counted, and its input."""
    for _ in range(2):
        yield from _norm("norms", model.hidden_size, batch, stored=0)
    yield Kept(module="MTP projection", bytes=2 * batch.element * batch.tokens * model.hidden_size, axis="tokens")


def _moe_layers(model: Model) -> int:
    return sum(model.is_moe_layer(layer) for layer in range(model.num_hidden_layers))


def _balance(model: Model, batch: Batch, policy: Policy, layers: int) -> Iterator[Kept]:
    """Denominators and loads of the balance losses of `layers` layers; scores, where their block let them go."""
    if model.moe is None:
        return
    capacity = model.moe.capacity
    if not isinstance(capacity, Dropless) and capacity.policy == "reroute":
        rule = "counts tokens that are dropped: a trace of shapes cannot tell which are sent on"
        raise ValueError(f"capacity={capacity!r}: the budget {rule}; take another policy, which keeps as many rows")
    experts, each, weight = model.moe.n_routed_experts, 0, 0
    for method in model.moe.balance:
        match method:
            case SequenceLoss():
                each += 4 * batch.tokens + 4 * batch.sequences * experts
            case SwitchLoss() | QuadraticLoss():
                each += 4 * batch.tokens + 4 * experts
            case ZLoss():
                each += 4 * batch.tokens * (experts + 1)  # logits and the logarithms of their sums
            case ExpertChoice():
                rule = "counts experts that tokens choose: a trace of shapes cannot tell which pairs experts choose"
                raise ValueError(f"balance={method!r}: the budget {rule}; leave it out, which keeps as many rows")
            case SimilarityLoss():
                copied = policy != "none" and batch.element < 4  # the weight in fp32, which a block run again lets go
                weight += 4 * experts * (experts + (model.hidden_size if copied else 0))  # and the gram matrix
            case SignBias() | CentredSignBias() | ProportionalBias() | QuantileBias():
                pass
            case _:
                assert_never(method)
    scores = 4 * batch.tokens * experts if each and policy != "none" else 0
    yield Kept(module="router", bytes=layers * (each + weight + scores), axis="tokens")


def recomputed_flops(model: Model, batch: Batch, policy: Policy) -> int:
    """FLOPs of the products that backward runs again, over the whole batch.

    A block is run again only up to the last tensor that backward asks for, so its last product is not.
    """
    if policy == "none":
        return 0
    products = forward_flops(model, batch.length)
    inside = {name: value for name, value in products.items() if ".self_attn." in name or ".mlp." in name}
    return batch.sequences * sum(value for name, value in inside.items() if _runs_again(model, batch, name, policy))


def _runs_again(model: Model, batch: Batch, name: str, policy: Policy) -> bool:
    loop = ".experts." in name and batch.element == 4
    if policy == "selective":
        up = name.endswith(("q_b_proj.weight", "kv_b_proj.weight"))
        # what the grouped product's sum keeps of it is its result
        return not loop and (up or name.endswith(".experts.down"))
    return not name.endswith("down_proj.weight")
