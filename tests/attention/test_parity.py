"""Latent attention against transformers' DeepSeek-V3, values and gradients; grouped attention against its Llama."""

import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config, LlamaConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from dsv3.attention import build
from dsv3.config import Grouped, Latent, Model, Rope, Yarn

YARN = Yarn(factor=40.0, original_max_position_embeddings=16, mscale=0.707, mscale_all_dim=0.707)
CASES = {
    "deepseek_v3": (12, 3, YARN),
    "plain_queries": (None, 3, YARN),
    "no_yarn": (12, 3, None),
    "one_head": (5, 1, None),
}


def ours_and_theirs(q_lora_rank: int | None, heads: int, yarn: Yarn | None) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The two modules with the same weights, and the published rotary embedding."""
    shape = Latent(
        num_attention_heads=heads,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=16,
        qk_nope_head_dim=10,
        qk_rope_head_dim=8,
        v_head_dim=14,
    )
    rope = Rope(scaling=yarn)
    model = Model(vocab_size=8, hidden_size=24, num_hidden_layers=1, intermediate_size=8, attention=shape, rope=rope)
    parameters: dict[str, object] = {"rope_theta": 10000.0, "rope_type": "default"}
    if yarn is not None:
        parameters |= vars(yarn) | {"rope_type": "yarn"}
    published = DeepseekV3Config(
        hidden_size=24,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=16,
        qk_nope_head_dim=10,
        qk_rope_head_dim=8,
        v_head_dim=14,
        rope_parameters=parameters,
        attn_implementation="eager",
    )
    ours, theirs = build(model, 0), DeepseekV3Attention(published, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, DeepseekV3RotaryEmbedding(published)


def causal_mask(length: int) -> torch.Tensor:
    return torch.full((length, length), float("-inf")).triu(1)[None, None]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("length", [1, 63])
@pytest.mark.parametrize("absorbed", [False, True], ids=["expanded", "absorbed"])
def test_latent_attention_has_the_published_values_and_gradients(
    case: tuple[int | None, int, Yarn | None], length: int, absorbed: bool
) -> None:
    ours, theirs, rotary = ours_and_theirs(*case)
    x = torch.randn(2, length, 24, generator=torch.Generator().manual_seed(1))
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, _ = ours(one, absorbed=absorbed)
    position = rotary(other, torch.arange(length)[None])
    expected, _ = theirs(other, position_embeddings=position, attention_mask=causal_mask(length))
    # fp32 eps is 6e-8; five products of about 20 terms follow each other, in orders of their own
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5 * expected.detach().abs().max().item())
    out.square().sum().backward()
    expected.square().sum().backward()
    mine = {"x": one.grad} | {name: p.grad for name, p in ours.named_parameters()}
    published = {"x": other.grad} | {name: p.grad for name, p in theirs.named_parameters()}
    assert mine.keys() == published.keys()
    for name, grad in mine.items():
        scale = published[name].abs().max().item()
        torch.testing.assert_close(grad, published[name], rtol=1e-4, atol=1e-4 * max(scale, 1.0))


def test_grouped_attention_has_llamas_values_once_pairs_are_reordered() -> None:
    """Llama turns pairs (i, i + P/2); reordering the rows of W_q and W_k makes them neighbours."""
    config = LlamaConfig(
        hidden_size=24, num_attention_heads=6, num_key_value_heads=2, head_dim=8, attn_implementation="eager"
    )
    theirs, rotary = LlamaAttention(config, 0), LlamaRotaryEmbedding(config)
    shape = Grouped(num_attention_heads=6, num_key_value_heads=2, head_dim=8)
    ours = build(Model(vocab_size=8, hidden_size=24, num_hidden_layers=1, intermediate_size=8, attention=shape), 0)
    neighbours = torch.arange(8).view(2, 4).T.flatten()
    weights = theirs.state_dict()
    for name in ("q_proj.weight", "k_proj.weight"):
        weights[name] = weights[name].view(-1, 8, 24)[:, neighbours].flatten(0, 1)
    ours.load_state_dict(weights)
    x = torch.randn(2, 63, 24, generator=torch.Generator().manual_seed(1))
    position = rotary(x, torch.arange(63)[None])
    expected, _ = theirs(x, position_embeddings=position, attention_mask=causal_mask(63))
    torch.testing.assert_close(ours(x)[0], expected, rtol=2e-5, atol=2e-6)
