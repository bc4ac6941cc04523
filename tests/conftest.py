"""What tests of several rooms share."""

import pytest
from jaxtyping import config as jaxtyping_config


@pytest.fixture
def annotations_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The annotations, where a test run checks them, refuse before our own words do and are no code for a compiler."""
    monkeypatch.setattr(jaxtyping_config, "jaxtyping_disable", True)
