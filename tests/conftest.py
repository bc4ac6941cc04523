"""What tests of several rooms share."""

import gc

import pytest
from jaxtyping import config as jaxtyping_config


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: what a worker takes last must not be what takes longest."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What is there by now stays to the end: going through it would take a third of a second at each `gc.collect()`, of
    which statsmodels makes one for each correction, and the meters several for each peak.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def annotations_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The annotations, where a test run checks them, refuse before our own words do and are no code for a compiler."""
    monkeypatch.setattr(jaxtyping_config, "jaxtyping_disable", True)
