"""The cache: what it holds, how large it is, and that its buffers are written in place."""

import pytest
import torch

from dsv3.attention import KeyValueCache
from dsv3.config import Attention, Everything, PerHead, Select
from tests.attention.variants import ATTENTIONS, INDEXER, config, hidden, module


@pytest.mark.parametrize(
    "name, select, numbers",
    [
        ("multi_head", Everything(), 2 * 4 * 6),
        ("grouped", Everything(), 2 * 2 * 6),
        ("latent", Everything(), 8 + 4),
        ("latent", PerHead(k=2), 8 + 4 + 4),
        ("latent", INDEXER, 8 + 4 + 6),
    ],
)
def test_a_token_takes_the_numbers_of_its_form(name: str, select: Select, numbers: int) -> None:
    attention: Attention = ATTENTIONS[name]
    cache = KeyValueCache.empty(config(attention, select), 3, 7, torch.bfloat16)
    assert cache.nbytes == 3 * 7 * numbers * 2
    assert cache.length == 0


def test_latent_attention_caches_the_normalised_latent_and_the_shared_rotated_key_alone() -> None:
    model = config(ATTENTIONS["latent"], Everything())
    made, cache = module(model), KeyValueCache.empty(model, 2, 9, torch.float64)
    with torch.no_grad():
        x = hidden(9)
        made(x, cache=cache.layers[0])
        compressed = made.kv_a_proj_with_mqa(x)
        latent = made.kv_a_layernorm(compressed[..., :8])
    assert list(cache.layers[0].buffers) == ["latent"]
    held = cache.layers[0].buffers["latent"]
    torch.testing.assert_close(held[..., :8], latent)
    # turning keeps lengths
    torch.testing.assert_close(held[..., 8:].norm(dim=-1), compressed[..., 8:].norm(dim=-1))


def test_a_cache_is_written_in_place_and_continues_from_any_earlier_length() -> None:
    model = config(ATTENTIONS["grouped"], Everything())
    made, x = module(model), hidden(12)
    start = KeyValueCache.empty(model, 2, 12, torch.float64)
    places = [buffer.data_ptr() for buffer in start.layers[0].buffers.values()]
    with torch.no_grad():
        made(x[:, :8], cache=start.layers[0])
        prefix = start.advance(8)
        made(hidden(4, seed=9), cache=prefix.layers[0])
        tail, _ = made(x[:, 8:], cache=prefix.layers[0])
        whole, _ = made(x)
    assert (start.length, prefix.length) == (0, 8)
    assert [buffer.data_ptr() for buffer in prefix.layers[0].buffers.values()] == places
    torch.testing.assert_close(tail, whole[:, 8:], rtol=1e-12, atol=1e-12)


def test_a_cache_holds_no_graph() -> None:
    model = config(ATTENTIONS["latent"], PerHead(k=2))
    cache = KeyValueCache.empty(model, 2, 5, torch.float64)
    module(model)(hidden(5), cache=cache.layers[0])
    assert not any(buffer.requires_grad for buffer in cache.layers[0].buffers.values())
