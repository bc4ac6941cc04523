"""What every model keeps, whatever its attention, experts and depth of prediction."""

import pytest
import torch
from jaxtyping import TypeCheckError

from dsv3.attention import KeyValueCache
from dsv3.config import Blocks, Model
from dsv3.model import Transformer
from dsv3.model.cost import kv_bytes_per_token, mtp_depths, parameter_shapes
from tests.model.variants import BASE, VARIANTS

# fp32 eps is 6e-8; a logit of about 1 is reached through some 20 products of up to 28 terms on each of two paths.
FP32 = 1e-5

every_model = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())


def tokens(config: Model, batch: int = 2, length: int = 13, seed: int = 0) -> torch.Tensor:
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@every_model
def test_output_has_a_logit_per_position_and_a_routing_per_expert_layer(config: Model) -> None:
    output = Transformer(config)(tokens(config))
    depths = mtp_depths(config)
    blocks = config.num_hidden_layers + depths
    assert output.logits.shape == (2, 13, config.vocab_size)
    assert [row.shape for row in output.mtp_logits] == [(2, 12 - m, config.vocab_size) for m in range(depths)]
    assert len(output.routing) == sum(config.is_moe_layer(layer) for layer in range(blocks))
    assert len(output.selection) == blocks
    assert output.cache is None


@every_model
def test_parameters_are_those_of_the_analytic_table(config: Model) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == parameter_shapes(config)


@every_model
def test_decoding_in_pieces_equals_the_whole_forward(config: Model) -> None:
    model, text = Transformer(config).eval(), tokens(config)
    cache = KeyValueCache.empty(config, 2, 13)
    pieces = []
    with torch.no_grad():
        for part in text.split([5, 3, 1, 1, 1, 1, 1], dim=1):
            output = model(part, cache=cache)
            assert output.cache is not None
            assert output.mtp_logits == ()
            cache = output.cache
            pieces.append(output.logits)
        whole = model(text).logits
    assert cache.length == 13
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=FP32, atol=FP32)


@every_model
def test_cache_holds_the_bytes_of_the_analytic_cost(config: Model) -> None:
    cache = KeyValueCache.empty(config, 2, 13)
    index = sum(layer.index.nbytes for layer in cache.layers if layer.index is not None)  # no number per token
    assert (index > 0) == isinstance(config.attention.select, Blocks)
    means = sum(mean.nbytes for layer in cache.layers for mean in layer.means or ())
    assert (means > 0) == (isinstance(config.attention.select, Blocks) and config.attention.select.learns == "branch")
    assert cache.nbytes - index - means == 2 * 13 * kv_bytes_per_token(config, bytes_per_value=4)


@every_model
def test_no_output_depends_on_a_later_token(config: Model) -> None:
    model, text = Transformer(config).eval(), tokens(config)
    changed = text.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % config.vocab_size
    before, after = model(text), model(changed)
    torch.testing.assert_close(before.logits[:, :9], after.logits[:, :9], rtol=FP32, atol=FP32)
    assert not torch.allclose(before.logits[:, 9:], after.logits[:, 9:], rtol=FP32, atol=FP32)
    for m, (ours, theirs) in enumerate(zip(before.mtp_logits, after.mtp_logits, strict=True), start=1):
        torch.testing.assert_close(ours[:, : 9 - m], theirs[:, : 9 - m], rtol=FP32, atol=FP32)


@every_model
def test_every_parameter_has_a_gradient(config: Model) -> None:
    model = Transformer(config)
    output = model(tokens(config, batch=8))
    losses = [logits.square().mean() for logits in (output.logits, *output.mtp_logits)]
    losses += [kept.loss for kept in output.selection if kept is not None and kept.loss is not None]
    sum(losses).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


@every_model
def test_bf16_follows_fp32(config: Model) -> None:
    model = Transformer(config).eval()
    whole = model(tokens(config)).logits
    half = model.to(torch.bfloat16)(tokens(config)).logits
    assert half.dtype == torch.bfloat16
    # bf16 keeps 8 bits: 2^-8 per rounding and some 30 roundings that add up in quadrature. A router whose choice tips
    # over moves single rows further, so the bound is on the bulk.
    error = (half.float() - whole).abs().median() / whole.abs().median()
    assert error < 30**0.5 * 2**-8


@every_model
def test_equal_seeds_give_equal_weights_and_leave_the_global_stream_alone(config: Model) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = Transformer(config, seed=1), Transformer(config, seed=1), Transformer(config, seed=2)
    assert torch.equal(torch.rand(3), expected)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.ndim == 1 or not torch.equal(a, c), name


def test_text_with_only_some_positions_ahead_predicts_what_it_can() -> None:
    config = VARIANTS["two_ahead"]
    output = Transformer(config)(tokens(config, length=2))
    assert [row.shape[1] for row in output.mtp_logits] == [1, 0]


def test_multi_token_prediction_is_left_out_when_asked() -> None:
    model, text = Transformer(BASE).eval(), tokens(BASE)
    with_mtp, without = model(text), model(text, mtp=False)
    assert torch.equal(with_mtp.logits, without.logits)
    assert without.mtp_logits == ()
    assert len(without.routing) == len(with_mtp.routing) - 1


@pytest.mark.parametrize(
    "text, says",
    [
        (torch.zeros(2, 0, dtype=torch.long), "tokens.shape"),
        (torch.zeros(5, dtype=torch.long), "tokens"),
        (torch.full((1, 3), 37), r"tokens=\(37, 37\): must be in \[0, 37\)"),
        (torch.full((1, 3), -1), "tokens"),
        (torch.zeros(1, 65, dtype=torch.long), "positions=65: must be at most max_position_embeddings=64"),
    ],
)
def test_tokens_that_make_no_sense_are_refused(text: torch.Tensor, says: str) -> None:
    # where annotations are checked as the tests run, a wrong number of axes does not get as far as our own check
    with pytest.raises((ValueError, TypeCheckError), match=says):
        Transformer(BASE)(text)
