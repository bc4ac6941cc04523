"""Initial weights: their spread, and that each parameter's numbers depend on its own name alone."""

import pytest
import torch
from scipy.stats import kstest

from dsv3.config import MTP, Model, PerHead, presets, vary
from dsv3.model import Transformer
from dsv3.model.initialise import stream
from tests.model.variants import BASE, VARIANTS, latent


def test_matrices_are_normal_and_norms_are_one() -> None:
    model = Transformer(presets.tiny().model, seed=7)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
    drawn = model.embed_tokens.weight.detach().flatten()[:20_000].double() / 0.02
    assert kstest(drawn.numpy(), "norm").pvalue > 1e-4
    assert model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize(
    "arm",
    [
        vary(BASE, mtp=None),
        vary(BASE, mtp=MTP(num_nextn_predict_layers=3)),
        vary(BASE, num_hidden_layers=5),
        vary(BASE, attention=latent(select=PerHead(k=3))),
        VARIANTS["tied"],
        VARIANTS["yarn"],
    ],
)
def test_an_arm_that_gains_or_loses_a_part_keeps_every_other_number(arm: Model) -> None:
    base, other = (dict(Transformer(config).named_parameters()) for config in (BASE, arm))
    shared = [name for name in base if name in other and not name.startswith("mtp.0.block")]
    assert len(shared) > 20
    for name in shared:
        assert torch.equal(base[name], other[name]), name


def test_streams_of_different_keys_are_different() -> None:
    keys = [(0, "a", "x"), (1, "a", "x"), (0, "b", "x"), (0, "a", "y"), (10, "a", "x"), (0, "a/x", "")]
    firsts = {torch.rand(1, generator=stream(*key)).item() for key in keys}
    assert len(firsts) == len(keys)
    assert torch.equal(torch.rand(9, generator=stream(3, "a", "b")), torch.rand(9, generator=stream(3, "a", "b")))
