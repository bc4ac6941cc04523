"""What every attention keeps, whatever makes its keys and whichever of them a query sees."""

import pytest
import torch
from torch import nn

from dsv3.attention import KeyValueCache, LatentAttention, attend, eager, reference
from dsv3.attention.select import reference as by_content
from dsv3.attention.select.reference_learning import weighed
from dsv3.config import (
    Auto,
    Blocks,
    Everything,
    Hierarchical,
    Indexer,
    Latent,
    Model,
    MultiHead,
    PerHead,
    Select,
    Window,
)
from dsv3.layers import frequencies, softmax_mscale
from tests.attention.variants import ATTENTIONS, SELECTS, VARIANTS, YARN, chosen, config, hidden, module, seen

# float64 eps is 2e-16; sums of up to 300 products of numbers of about 1, on two paths
FLOAT64 = 1e-12

every_variant = pytest.mark.parametrize("model", VARIANTS.values(), ids=VARIANTS.keys())
every_select = pytest.mark.parametrize("select", SELECTS.values(), ids=SELECTS.keys())
every_attention = pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS.keys())


@every_variant
@pytest.mark.parametrize("length", [1, 63, 100])
def test_output_has_the_shape_of_the_input_and_says_what_was_selected(model: Model, length: int) -> None:
    out, selection = module(model)(hidden(length))
    assert out.shape == (2, length, 20)
    select = model.attention.select
    assert (selection is None) == (isinstance(select, Everything) or (isinstance(select, Auto) and length == 1))
    if selection is not None:
        assert (selection.weights is not None) == isinstance(select, PerHead)
        learns = select.learns if isinstance(select, Blocks) else "nothing"
        assert (selection.bias is not None) == (learns in ("gated", "entmax"))
        assert (selection.loss is not None) == (learns == "distilled" or isinstance(select, Indexer))


@every_variant
@pytest.mark.parametrize("length, first_changed", [(63, 20), (600, 530)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_output_changes_by_a_bit_when_later_tokens_change(
    model: Model, length: int, first_changed: int, dtype: torch.dtype
) -> None:
    made, before = module(model, dtype), hidden(length, dtype=dtype)
    after = before.clone()
    after[:, first_changed:] = 3 * hidden(length - first_changed, seed=1, dtype=dtype)
    with torch.no_grad():
        one, other = made(before)[0], made(after)[0]
    assert torch.equal(one[:, :first_changed], other[:, :first_changed])
    assert not torch.equal(one[:, first_changed:], other[:, first_changed:])


@every_variant
def test_prefill_and_decoding_equal_the_whole_forward(model: Model) -> None:
    made, x = module(model), hidden(61)
    cache, pieces = KeyValueCache.empty(model, 2, 61, torch.float64), []
    with torch.no_grad():
        for part in x.split([40, 11, *[1] * 10], dim=1):
            pieces.append(made(part, cache=cache.layers[0])[0])
            cache = cache.advance(part.shape[1])
        whole = made(x)[0]
    assert cache.length == 61
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=FLOAT64, atol=FLOAT64)


@every_variant
@pytest.mark.parametrize("length", [1, 13])
def test_values_and_gradients_are_those_of_the_definition(model: Model, length: int) -> None:
    made, x = module(model), hidden(length, batch=1)
    results = []
    for form in (lambda x: made(x)[0], lambda x: by_definition(made, model, x)):
        leaf = x.clone().requires_grad_()
        made.zero_grad()
        out = form(leaf)
        out.square().sum().backward()
        results.append((out, leaf.grad, *(p.grad for p in made.parameters())))
    # the rotation's frequencies are fp32 on both sides; the reference takes sines of Python floats
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@every_attention
@pytest.mark.parametrize(
    "all_of_them",
    [
        Window(size=100),
        Window(size=1, sink=100),
        PerHead(k=100),
        PerHead(keep=1.0),
        Blocks(k=50, block_q=4, block_k=2),
        Blocks(keep=1.0),
        Hierarchical(k=50, block_q=1, block_k=2),
        Hierarchical(k=50, block_q=1, block_k=2, search="best_first"),
        Auto(k=4, block_q=4, block_k=2, crossover=100),
    ],
)
def test_a_selection_that_keeps_everything_is_dense_attention(attention: Select, all_of_them: Select) -> None:
    made, x = module(config(attention, all_of_them)), hidden(100)
    dense = module(config(attention, Everything()))
    dense.load_state_dict({name: weight for name, weight in made.state_dict().items() if "importance" not in name})
    if isinstance(all_of_them, PerHead):
        made.importance.proj.weight.data.zero_()
    torch.testing.assert_close(made(x)[0], dense(x)[0], rtol=FLOAT64, atol=FLOAT64)


@every_variant
@pytest.mark.parametrize("length", [7, 70])
def test_gradients_are_those_of_finite_differences(model: Model, length: int) -> None:
    made, x = module(model), hidden(length, batch=2).requires_grad_()
    names = [name for name, _ in made.named_parameters()]

    def forward(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(made, dict(zip(names, weights, strict=True)), (x,))[0]

    # fast mode compares one random direction: a wrong gradient has no chance to pass all variants
    assert torch.autograd.gradcheck(forward, (x, *made.parameters()), fast_mode=True)


@every_select
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("queries, total", [(1, 1), (1, 30), (35, 35), (20, 23), (17, 60)])
@pytest.mark.parametrize("width, value", [(6, 6), (7, 4), (4, 7)])
def test_attend_equals_the_reference_in_values_and_gradients(
    select: Select, heads: int, groups: int, queries: int, total: int, width: int, value: int
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        # heads behind positions in memory, as projections leave them
        return torch.randn(*shape, generator=generator, dtype=torch.float64).transpose(1, 2).requires_grad_()

    every, k, v = draw(1, total, heads, width), draw(1, total, groups, width), draw(1, total, groups, value)
    q = every[:, :, total - queries :].detach().requires_grad_()
    importance, compared = draw(1, total, heads), (every, k)
    weights = importance if isinstance(select, PerHead) else None
    ours = attend(q, k, v, chosen(select, importance, queries, 16, compared, 0.7), scale=0.7)
    theirs = reference.attention(q, k, v, seen(select, importance, compared, 0.7), scale=0.7, weights=weights)
    torch.testing.assert_close(ours, theirs, rtol=FLOAT64, atol=FLOAT64)
    leaves = [q, k, v] if weights is None else [q, k, v, importance]
    pull = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    grads = zip(torch.autograd.grad(ours, leaves, pull), torch.autograd.grad(theirs, leaves, pull), strict=True)
    for mine, reference_grad in grads:
        torch.testing.assert_close(mine, reference_grad, rtol=FLOAT64, atol=FLOAT64)


@every_select
@pytest.mark.parametrize("block_q", [1, 16, 100])
@pytest.mark.parametrize("queries, total", [(100, 100), (37, 100), (1, 50)])
def test_selectors_let_through_exactly_the_keys_of_the_reference_and_count_them(
    select: Select, block_q: int, queries: int, total: int
) -> None:
    # whole numbers: equal importances must be common for the rule of ties to matter; 4 heads: their mean is exact
    generator = torch.Generator().manual_seed(0)
    importance = torch.randint(0, 9, (2, 4, total), generator=generator).double()
    compared = torch.randint(-2, 3, (2, 2, 4, total, 4), generator=generator).double()
    selection = chosen(select, importance, queries, block_q, (compared[0], compared[1]), 0.5)
    expected, kept = seen(select, importance, (compared[0], compared[1]), 0.5), 0
    if selection is None:
        return
    found = reference.selected(selection, heads=4, queries=queries, total=total)
    for b in range(2):
        for h in range(4):
            for t in range(total - queries, total):
                keys = list(found(b, h, t))
                assert keys == list(expected(b, h, t))
                kept += len(keys)
    shared = 4 // selection.indices.shape[1]
    assert kept == selection.cost.kept * shared


@every_select
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2)])
def test_selections_hold_in_half_precision(select: Select, heads: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 50, 8, generator=generator).bfloat16() for n in (heads, groups, groups))
    importance = torch.randn(1, heads, 50, generator=generator).bfloat16()
    ours = attend(q, k, v, chosen(select, importance, 50, 16, (q, k)))
    weights = importance if isinstance(select, PerHead) else None
    theirs = reference.attention(q, k, v, seen(select, importance, (q, k)), scale=8**-0.5, weights=weights)
    # bf16 keeps 8 bits: weights and the output are each rounded once, values of up to 3 averaged
    torch.testing.assert_close(ours.double(), theirs, rtol=2**-7, atol=3 * 2**-8)


@every_select
def test_autocast_runs_selected_attention_in_its_format(select: Select) -> None:
    model = config(ATTENTIONS["latent"], select)
    made, x = module(model, torch.float32), hidden(40, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = made(x)
        out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    # bf16 keeps 8 bits: six products of about 20 terms follow each other; the choice of keys may differ at near-ties
    difference = (out - made(x)[0]).float().square().mean().sqrt()
    assert difference < 0.15 * made(x)[0].square().mean().sqrt()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in made.parameters())


@every_select
@pytest.mark.parametrize("length", [1, 2, 63])
def test_absorbed_latent_attention_equals_the_expanded_form(select: Select, length: int) -> None:
    for name in ("latent", "latent_plain_queries"):
        made, x = module(config(ATTENTIONS[name], select)), hidden(length)
        absorbed, expanded = made(x, absorbed=True)[0], made(x, absorbed=False)[0]
        torch.testing.assert_close(absorbed, expanded, rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize("model", [m for n, m in VARIANTS.items() if "per_head" in n], ids=str)
def test_the_importance_map_learns(model: Model) -> None:
    made = module(model)
    made(hidden(63))[0].square().sum().backward()
    assert bool((made.importance.proj.weight.grad.abs() > 0).all())


@pytest.mark.parametrize("queries, total", [(1, 1), (1, 9), (5, 9), (63, 63)])
@pytest.mark.parametrize("width, value", [(6, 6), (6, 4), (4, 6)])
def test_eager_attention_is_dense_attention(queries: int, total: int, width: int, value: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, queries, width, generator=generator, dtype=torch.float64)
    k = torch.randn(2, 2, total, width, generator=generator, dtype=torch.float64)
    v = torch.randn(2, 2, total, value, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(eager(q, k, v, scale=0.5), attend(q, k, v, scale=0.5), rtol=FLOAT64, atol=FLOAT64)


def test_a_module_on_the_meta_device_computes_after_its_weights_arrive() -> None:
    for attention in (ATTENTIONS["latent"], MultiHead(num_attention_heads=2, head_dim=6)):
        model = config(attention, Everything())
        real = module(model, torch.float32)
        with torch.device("meta"):
            made = module(model, torch.float32)
        made.load_state_dict(real.state_dict(), assign=True)
        x = hidden(9, dtype=torch.float32)
        assert torch.equal(made(x)[0], real(x)[0])


def by_definition(made: nn.Module, model: Model, x: torch.Tensor) -> torch.Tensor:
    """The module's output by the reference."""
    weights, shape = dict(made.named_parameters()), model.attention
    added = weights.get("importance.proj.weight")
    importance = None if added is None else (x @ added.T).transpose(1, 2)
    rotated = getattr(shape.select, "rotated", True)
    if isinstance(made, LatentAttention):
        assert isinstance(shape, Latent)
        if isinstance(shape.select, Indexer):
            scores = by_content.index_scores(x, weights, shape, model.rope)
            topk = shape.select.index_topk if shape.select.stage == "sparse" else x.shape[1]
            keys = by_content.indexed(scores, topk)
            return reference.latent(x, weights, shape, model.rope, keys)
        compared = reference.latent_space(x.detach(), weights, shape, model.rope, rotated=rotated)
        keys = seen(shape.select, importance, compared, shape.qk_head_dim**-0.5 * softmax_mscale(YARN))
        return reference.latent(x, weights, shape, model.rope, keys)

    def split(name: str) -> torch.Tensor:
        return (x @ weights[name].T).unflatten(-1, (-1, shape.head_dim)).transpose(1, 2)

    def turned(heads: torch.Tensor) -> torch.Tensor:
        rows = [reference.rotate(row, i % x.shape[1], frequency) for i, row in enumerate(heads.flatten(0, 2))]
        return torch.stack(rows).view(heads.shape)

    frequency = frequencies(shape.head_dim, YARN)
    scale = shape.head_dim**-0.5 * softmax_mscale(YARN)
    plain = split("q_proj.weight"), split("k_proj.weight")
    q, k = turned(plain[0]), turned(plain[1])
    keys, bias, v = seen(shape.select, importance, (q, k) if rotated else plain, scale), None, split("v_proj.weight")
    if isinstance(shape.select, Blocks) and shape.select.learns in ("gated", "entmax"):
        keys, bias = weighed(shape.select, *((q, k) if rotated else plain), scale=scale)
    out = reference.attention(q, k, v, keys, scale=scale, weights=importance, bias=bias)
    if "gates.weight" in weights:
        gates = (x @ weights["gates.weight"].T).sigmoid().transpose(1, 2)[..., None]
        branch = reference.pooled(q, k, v, shape.select.block_k, scale=scale)
        out = gates[:, : q.shape[1]] * branch + gates[:, q.shape[1] :] * out
    return out.transpose(1, 2).flatten(2) @ weights["o_proj.weight"].T
