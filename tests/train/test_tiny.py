"""The promise of the tiny preset: it learns more than pairs of tokens, in minutes on two cores."""

import pytest

from dsv3.config import presets
from dsv3.train import run


@pytest.mark.slow
def test_the_tiny_preset_beats_the_bigram_within_300_steps() -> None:
    result = run(presets.tiny(), progress=False)
    assert result.config.train.steps <= 300
    assert result.validation[-1].bits_per_byte < result.baselines["bigram"]
