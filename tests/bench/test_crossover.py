"""From which length on a tree is faster: how it is found, and the table that it is written to."""

import tomllib
from pathlib import Path

from bench.crossover import HEAD, crossing
from bench.measured_table import write
from dsv3.attention.select.auto import TABLE, UNMEASURED, rows


def test_the_committed_table_has_each_kind_once_and_is_as_its_command_writes_it(tmp_path: Path) -> None:
    table = rows()
    kinds = [(row["instructions"], row["dtype"], row["direction"]) for row in table]
    assert len(set(kinds)) == len(kinds) > 0
    for row in table:
        median, low, high = row["ratio"]
        assert low <= median <= high < 1
        assert 0 < row["length"] < UNMEASURED
    again = tmp_path / "auto.toml"
    write(again, HEAD, table)
    assert again.read_text() == TABLE.read_text()
    assert tomllib.loads(HEAD) == {}


def test_the_crossover_is_where_the_whole_interval_stays_below_one() -> None:
    ratios = {8192: (0.2, 0.1, 0.3), 4096: (0.5, 0.4, 0.6), 2048: (0.9, 0.8, 0.99), 1024: (0.95, 0.9, 1.01)}
    asked: list[int] = []

    def ratio(length: int) -> tuple[float, float, float]:
        asked.append(length)
        return ratios[length]

    assert crossing(ratio) == (2048, (0.9, 0.8, 0.99))
    assert asked == [8192, 4096, 2048, 1024]
    assert crossing(lambda length: (1.2, 1.1, 1.3))[0] is None
