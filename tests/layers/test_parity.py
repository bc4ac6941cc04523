"""Layers against transformers' DeepSeek-V3: the same rounding, the same rotation up to the order of its outputs."""

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3MLP,
    DeepseekV3RMSNorm,
    DeepseekV3RotaryEmbedding,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
)

from dsv3.config import Rope, Yarn
from dsv3.layers import RMSNorm, SwiGLU, frequencies, rotate, rotate_halves
from dsv3.layers.rope import magnitude

YARNS = {
    "deepseek_v3": Yarn(factor=40.0, original_max_position_embeddings=4096),
    "deepseek_v2_lite": Yarn(factor=40.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707),
    "short": Yarn(factor=4.0, original_max_position_embeddings=64, beta_fast=16.0, beta_slow=2.0),
    "unequal": Yarn(factor=8.0, original_max_position_embeddings=256, mscale=0.5, mscale_all_dim=1.0),
}


def published(rope: Rope, dim: int) -> DeepseekV3RotaryEmbedding:
    """transformers' rotary embedding of the same positions."""
    parameters: dict[str, object] = {"rope_theta": rope.theta, "rope_type": "default"}
    if rope.scaling is not None:
        parameters |= vars(rope.scaling) | {"rope_type": "yarn"}
    config = DeepseekV3Config(
        qk_rope_head_dim=dim, qk_nope_head_dim=dim, rope_parameters=parameters, max_position_embeddings=4096
    )
    return DeepseekV3RotaryEmbedding(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_equals_the_published_one_bit_for_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 63, generator=generator).to(dtype)
    ours, theirs = RMSNorm(63, 1e-6).to(dtype), DeepseekV3RMSNorm(63, 1e-6).to(dtype)
    weight = torch.randn(63, generator=generator).to(dtype)
    ours.weight.data = theirs.weight.data = weight
    assert torch.equal(ours(x), theirs(x))


def test_swiglu_equals_the_published_network_bit_for_bit() -> None:
    theirs = DeepseekV3MLP(DeepseekV3Config(hidden_size=20), intermediate_size=28)
    ours = SwiGLU(20, 28)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("yarn", YARNS.values(), ids=YARNS.keys())
@pytest.mark.parametrize("dim", [16, 64])
def test_yarn_has_the_published_frequencies_and_magnitude(yarn: Yarn, dim: int) -> None:
    rope = Rope(scaling=yarn)
    theirs = published(rope, dim)
    # both compute in fp32, in orders of their own: a few roundings of a number up to 1
    torch.testing.assert_close(frequencies(dim, rope), theirs.inv_freq, rtol=4e-7, atol=0)
    assert magnitude(rope) == pytest.approx(theirs.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("rope", [Rope(), *(Rope(scaling=yarn) for yarn in YARNS.values())])
def test_dot_products_of_turned_vectors_are_the_published_ones(rope: Rope) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 63, 16, generator=generator) for _ in range(2))
    position = torch.arange(63)
    cos, sin = published(rope, 16)(q, position[None])
    q_theirs, k_theirs = apply_rotary_pos_emb_interleave(q, k, cos, sin)
    turn = frequencies(16, rope), magnitude(rope)
    ours = rotate(q, position, *turn) @ rotate(k, position, *turn).mT
    # angles up to 62 turn with an error of 62 eps, and 16 products add up
    torch.testing.assert_close(ours, q_theirs @ k_theirs.mT, rtol=0, atol=62 * 16 * torch.finfo(torch.float32).eps)


def test_turned_halves_are_the_published_ones_element_by_element() -> None:
    q, k = torch.randn(2, 1, 3, 10, 8, generator=torch.Generator().manual_seed(0))
    position = torch.arange(10)
    cos, sin = published(Rope(), 8)(q, position[None])
    theirs = apply_rotary_pos_emb(q, k, cos, sin)
    for x, expected in zip((q, k), theirs, strict=True):
        # a sine and a cosine of an angle up to 9, each off by an eps of it
        eps = torch.finfo(torch.float32).eps
        torch.testing.assert_close(
            rotate_halves(x, position, frequencies(8, Rope())), expected, rtol=0, atol=9 * 4 * eps
        )


def test_turned_vectors_are_the_published_ones_in_another_order() -> None:
    x = torch.randn(1, 1, 10, 8, generator=torch.Generator().manual_seed(0))
    position = torch.arange(10)
    cos, sin = published(Rope(), 8)(x, position[None])
    theirs, _ = apply_rotary_pos_emb_interleave(x, x, cos, sin)
    ours = rotate(x, position, frequencies(8, Rope()))
    torch.testing.assert_close(torch.cat((ours[..., 0::2], ours[..., 1::2]), dim=-1), theirs, rtol=0, atol=2e-6)
