"""The table of metrics, and the way from a figure to a record."""

import pytest

from bench.fingerprint import Provenance
from bench.measurement import Measurement, Point, failure, record
from bench.metrics import METRICS, metric

HERE = Provenance(machine="8626a598a4c9", revision="ad36caf", profile="quick", corpus="c0ffee")
POINT = Point(study="moe_capacity", arm="1.2", baseline="dropless", seed=1, axes={"factor": 1.2}, rule="0123")


def test_the_table_is_alphabetical_and_names_each_metric_once() -> None:
    names = [row.name for row in METRICS]
    assert names == sorted(set(names))


@pytest.mark.parametrize("row", METRICS, ids=lambda row: row.name)
def test_a_row_says_what_it_means_and_how_it_misleads(row: object) -> None:
    assert all(value != "" for value in vars(row).values())


def test_times_belong_to_this_machine() -> None:
    assert not any(row.transfers for row in METRICS if row.unit in ("s", "token/s") or row.name.endswith("_ratio"))


def test_an_unknown_metric_names_its_neighbours() -> None:
    with pytest.raises(ValueError, match=r"metric='max_viol'.*max_vio"):
        metric("max_viol")
    with pytest.raises(ValueError, match=r"metric='zzzzzz'.*add a row"):
        Measurement(metric="zzzzzz", value=1)


def test_a_record_takes_unit_and_noise_from_the_table() -> None:
    measurement = Measurement(metric="drop_share", value=0.125, n=2, over="seeds", samples=(0.1, 0.15))
    made = record(POINT, HERE, measurement, time="now")
    assert (made.unit, made.noise, made.value, made.rule, made.corpus) == ("share", "exact", 0.125, "0123", "c0ffee")


def test_a_failure_has_no_value_and_says_why() -> None:
    made = failure(POINT, HERE, "loss", "the arm ran out of memory")
    assert (made.value, made.n, made.error, made.noise) == (None, 0, "the arm ran out of memory", "absolute")
