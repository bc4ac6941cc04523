"""What holds for all inputs of the layers, and gradients in float64."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dsv3.config import Rope, Yarn
from dsv3.layers import RMSNorm, SwiGLU, frequencies, rotate
from dsv3.layers.rope import _turn, _turn_complex

seeds = st.integers(0, 2**31)
pairs = st.integers(1, 9)
yarns = st.none() | st.builds(
    Yarn,
    factor=st.floats(1, 64),
    original_max_position_embeddings=st.integers(8, 4096),
    beta_fast=st.floats(2, 64),
    beta_slow=st.floats(0.25, 1.5),
)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(seeds, pairs, st.integers(0, 5000), st.integers(0, 5000), yarns)
def test_a_dot_product_depends_on_the_distance_of_positions_only(
    seed: int, half: int, first: int, second: int, yarn: Yarn | None
) -> None:
    q, k = normal(2, 1, 2 * half, seed=seed)
    turn = frequencies(2 * half, Rope(scaling=yarn))
    shift = 137

    def score(at_q: int, at_k: int) -> float:
        return float(rotate(q, torch.tensor([at_q]), turn) @ rotate(k, torch.tensor([at_k]), turn).mT)

    # the angle of position 5000 is known to 5000 eps
    bound = 1e4 * torch.finfo(torch.float64).eps * float(q.norm() * k.norm())
    assert math.isclose(score(first, second), score(first + shift, second + shift), abs_tol=bound)


@given(seeds, pairs, st.integers(1, 70), yarns)
def test_rotation_keeps_the_length_of_every_vector(seed: int, half: int, length: int, yarn: Yarn | None) -> None:
    x = normal(2, length, 2 * half, seed=seed)
    turned = rotate(x, torch.arange(length), frequencies(2 * half, Rope(scaling=yarn)))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


@given(pairs, yarns)
def test_frequencies_fall_and_yarn_only_lowers_them(half: int, yarn: Yarn | None) -> None:
    plain, stretched = frequencies(2 * half, Rope()), frequencies(2 * half, Rope(scaling=yarn))
    assert bool((plain[1:] < plain[:-1]).all())
    assert bool((stretched <= plain * (1 + 1e-6)).all())
    assert yarn is None or bool((stretched >= plain / yarn.factor * (1 - 1e-6)).all())


@given(seeds, pairs, st.integers(1, 20), st.integers(0, 1))
def test_compiled_and_eager_rotation_agree_on_whole_and_cut_tensors(
    seed: int, half: int, length: int, cut: int
) -> None:
    """A cut by an odd width leaves pairs at odd addresses, which a complex view refuses."""
    pair = normal(2, length, cut + 2 * half, seed=seed)[..., cut:].unflatten(-1, (-1, 2))
    angle = normal(length, half, seed=seed + 1)
    torch.testing.assert_close(_turn(pair, angle, 1.5), _turn_complex(pair, angle, 1.5))


@given(seeds, st.integers(1, 100), st.floats(1e-3, 1e3))
def test_rms_norm_does_not_see_the_scale_of_a_row(seed: int, dim: int, factor: float) -> None:
    x = normal(3, dim, seed=seed)
    norm = RMSNorm(dim, eps=0.0).double()
    torch.testing.assert_close(norm(factor * x), norm(x))
    torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(3, dtype=torch.float64))


def test_layers_have_the_gradients_of_their_values() -> None:
    x = normal(2, 3, 6, seed=0).requires_grad_()
    for module in (RMSNorm(6).double(), SwiGLU(6, 5).double()):
        names = [name for name, _ in module.named_parameters()]

        def of_all(
            x: torch.Tensor, *weights: torch.Tensor, module: nn.Module = module, names: list[str] = names
        ) -> object:
            return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))

        assert torch.autograd.gradcheck(of_all, (x, *module.parameters()))


def test_rotation_has_the_gradient_of_its_values() -> None:
    x, turn = normal(2, 3, 6, seed=0).requires_grad_(), frequencies(6, Rope())
    assert torch.autograd.gradcheck(lambda x: rotate(x, torch.tensor([0, 4, 9]), turn), (x,))
