"""statsmodels collects garbage at every correction: beside torch that is a tenth of a second, thousands of times."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _what_is_there_is_no_garbage() -> Iterator[None]:
    gc.freeze()
    yield
    gc.unfreeze()
