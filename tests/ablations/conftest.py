from pathlib import Path

import pytest

from ablations.catalogue import load
from ablations.study import Study


@pytest.fixture
def coin() -> Study:
    """The study of coin_study.py."""
    return load(str(Path(__file__).with_name("coin_study.py")))
