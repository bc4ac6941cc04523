"""Initial weights: their spread, and that each parameter's numbers depend on its own name alone."""

import pytest
import torch
from scipy.stats import kstest

from dsv3.config import MTP, Model, PerHead, presets, vary
from dsv3.model import Transformer
from dsv3.model.initialise import stream
from tests.model.variants import BASE, VARIANTS, latent


@pytest.mark.parametrize("embedding_range, spread", [(None, 0.02), (1.0, 1.0)])
def test_matrices_are_normal_and_norms_are_one(embedding_range: float | None, spread: float) -> None:
    config = vary(presets.tiny().model, initializer_range=0.02, embedding_range=embedding_range)
    model = Transformer(config, seed=7)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
    for weight, std in ((model.embed_tokens.weight, spread), (model.layers[2].mlp.experts.gate_up, 0.02)):
        drawn = weight.detach().flatten().double() / std
        assert kstest(drawn[:20_000].numpy(), "norm").pvalue > 1e-4
        # the deviation of n draws is off by 1 / sqrt(2 n); four of those
        assert abs(drawn.std().item() - 1) < 4 * (2 * drawn.numel()) ** -0.5


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
