"""Labels along an axis never touch: a place too close to the one before it keeps its tick and loses its text."""

import pytest

from reports.figures import _labels


@pytest.mark.parametrize(
    "places, log, shown",
    [
        ([16, 32, 64, 110, 120, 125, 128], True, ["16", "32", "64", "110", "", "", "128"]),
        ([0, 50, 100], False, ["0", "50", "100"]),
        ([0, 1, 2, 100], False, ["0", "", "", "100"]),
        ([7], True, ["7"]),
        (["cpu", "cuda"], False, ["cpu", "cuda"]),
    ],
)
def test_a_label_stands_clear_of_the_one_before(places: list[int | str], log: bool, shown: list[str]) -> None:
    assert _labels(places, log=log) == shown
