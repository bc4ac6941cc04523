"""statsmodels collects garbage at every correction: beside torch that is a tenth of a second, thousands of times, and
beside what a worker has made by then several.
"""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _what_is_there_is_no_garbage() -> Iterator[None]:
    gc.freeze()
    yield
    gc.unfreeze()
