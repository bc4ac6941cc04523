"""Layers against numbers worked by hand, and YaRN against the figures of DeepSeek-V3's published code."""

import math

import pytest
import torch

from dsv3.config import Rope, Yarn
from dsv3.layers import RMSNorm, SwiGLU, frequencies, rotate, rotate_halves, softmax_mscale, swiglu
from dsv3.layers.rope import magnitude

DEEPSEEK_V3 = Rope(scaling=Yarn(factor=40.0, original_max_position_embeddings=4096))


def test_rms_norm_divides_by_the_root_mean_square_and_multiplies_by_the_weight() -> None:
    norm = RMSNorm(2, eps=0.0)
    norm.weight.data = torch.tensor([1.0, -2.0])
    # mean of 3^2 and 4^2 is 12.5
    expected = torch.tensor([[3 / math.sqrt(12.5), -8 / math.sqrt(12.5)]])
    torch.testing.assert_close(norm(torch.tensor([[3.0, 4.0]])), expected)


def test_rms_norm_of_zeros_is_zero() -> None:
    assert torch.equal(RMSNorm(3, eps=1e-6)(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_rms_norm_rounds_the_quotient_before_it_multiplies() -> None:
    norm = RMSNorm(2, eps=0.0).bfloat16()
    norm.weight.data = torch.tensor([3.0, 3.0], dtype=torch.bfloat16)
    x = torch.tensor([[1.0, 5.0]])
    quotient = x / math.sqrt(13)
    assert torch.equal(norm(x.bfloat16()), quotient.bfloat16() * 3)
    assert not torch.equal(norm(x.bfloat16()), (quotient * 3).bfloat16())


def test_swiglu_gates_by_the_sigmoid_linear_unit() -> None:
    # silu(1) = 1 / (1 + 1/e)
    gated = swiglu(torch.tensor([1.0, -1.0]), torch.tensor([10.0, 10.0]))
    torch.testing.assert_close(gated, torch.tensor([10 / (1 + math.exp(-1)), -10 / (1 + math.e)]))


def test_swiglu_network_is_down_of_gated_up() -> None:
    network = SwiGLU(1, 1)
    for name, value in (("gate_proj", 2.0), ("up_proj", 3.0), ("down_proj", 5.0)):
        getattr(network, name).weight.data.fill_(value)
    # 5 * (silu(2 * 0.5) * (3 * 0.5))
    expected = 7.5 / (1 + math.exp(-1))
    assert network(torch.tensor([[0.5]])).item() == pytest.approx(expected, rel=1e-6)


def test_rotation_turns_neighbouring_pairs_by_position_times_frequency() -> None:
    x = torch.tensor([[1.0, 0.0, 0.0, 2.0]])
    turned = rotate(x, torch.tensor([3]), torch.tensor([0.5, 0.1]))
    expected = [math.cos(1.5), math.sin(1.5), -2 * math.sin(0.3), 2 * math.cos(0.3)]
    torch.testing.assert_close(turned, torch.tensor([expected]))


def test_rotation_of_halves_turns_each_number_with_the_one_half_a_width_further() -> None:
    x = torch.tensor([[1.0, 0.0, 0.0, 2.0]])
    turned = rotate_halves(x, torch.tensor([3]), torch.tensor([0.5, 0.1]), 2.0)
    expected = [2 * math.cos(1.5), -4 * math.sin(0.3), 2 * math.sin(1.5), 4 * math.cos(0.3)]
    torch.testing.assert_close(turned, torch.tensor([expected]))


def test_rotation_at_position_zero_changes_nothing() -> None:
    x = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rotate(x, torch.tensor([0]), frequencies(6, Rope())), x)


def test_plain_frequencies_fall_geometrically_from_one() -> None:
    torch.testing.assert_close(frequencies(4, Rope(theta=100.0)), torch.tensor([1.0, 0.1]))


def test_yarn_keeps_fast_pairs_divides_slow_ones_and_blends_between() -> None:
    """At theta 10000, width 64, factor 40 over 4096 positions, the blend runs from pair 10 to pair 23."""
    ratio = frequencies(64, DEEPSEEK_V3) / frequencies(64, Rope())
    ramp = [min(max((i - 10) / 13, 0.0), 1.0) for i in range(32)]
    torch.testing.assert_close(ratio, torch.tensor([r / 40 + 1 - r for r in ramp]))


def test_yarn_raises_the_softmax_scale_of_deepseek_v3_by_1_8738542() -> None:
    assert softmax_mscale(DEEPSEEK_V3) == pytest.approx(1.8738542, abs=5e-8)
    assert magnitude(DEEPSEEK_V3) == 1.0


@pytest.mark.parametrize(
    "mscale, all_dim, softmax, turned",
    [
        (0.707, 1.0, 1.3688879**2, 1.2608038 / 1.3688879),
        (1.0, 0.0, 1.0, 1.3688879),
        (0.0, 1.0, 1.3688879**2, 1.3688879),
    ],
)
def test_unequal_mscales_go_to_the_softmax_scale_and_to_the_turned_vectors(
    mscale: float, all_dim: float, softmax: float, turned: float
) -> None:
    rope = Rope(scaling=Yarn(factor=40.0, original_max_position_embeddings=4096, mscale=mscale, mscale_all_dim=all_dim))
    assert softmax_mscale(rope) == pytest.approx(softmax, rel=1e-6)
    assert magnitude(rope) == pytest.approx(turned, rel=1e-6)


def test_a_factor_of_one_stretches_nothing() -> None:
    rope = Rope(scaling=Yarn(factor=1.0, original_max_position_embeddings=4096))
    torch.testing.assert_close(frequencies(64, rope), frequencies(64, Rope()))
    assert softmax_mscale(rope) == 1.0


@pytest.mark.parametrize("dim", [0, -2, 5])
def test_frequencies_refuse_a_width_that_is_no_number_of_pairs(dim: int) -> None:
    with pytest.raises(ValueError, match=rf"dim={dim}: must be even: .*; use an even width"):
        frequencies(dim, Rope())
