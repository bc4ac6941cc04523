"""Whose records speak where several machines have left some: times of one, counts and losses of all."""

from dataclasses import replace

from bench.machines import other_machines, speaker, speaking
from bench.record import Record
from tests.statistics.draws import record

LOSS = record(1.0, metric="loss", unit="nats", machine="m1")
TIME = replace(LOSS, metric="cpu_seconds", unit="s", noise="absolute")


def elsewhere(row: Record, **changes: object) -> Record:
    return replace(row, machine="m2", **changes)  # type: ignore[arg-type]


def test_of_times_the_newest_machine_speaks_and_the_sentence_counts_the_others() -> None:
    here, there = TIME, elsewhere(TIME)
    assert other_machines([]) == other_machines([here, here]) == ""
    said = "Records of 2 machines: m2 speaks; 2 of m1 stand aside."
    assert other_machines([here, there, here, there]) == said
    failed = replace(here, value=None, error="lost", n=0)
    assert speaking([here, there, failed]) == (there,), "an error says nothing of a machine's figures"
    assert other_machines([here, there, failed]) == said
    assert speaking([failed, elsewhere(failed)]) == (elsewhere(failed),)
    assert speaking([]) == ()
    assert speaker([]) is None


def test_what_transfers_counts_wherever_it_was_measured() -> None:
    rows = [LOSS, TIME, replace(LOSS, seed=1), elsewhere(LOSS, seed=2), elsewhere(TIME, seed=2)]
    assert speaker(rows) == "m2"
    assert speaking(rows) == (rows[0], *rows[2:])
    said = "Records of 2 machines: m2 speaks; 1 of m1 stand aside; 2 of others hold on any machine and count."
    assert other_machines(rows) == said


def test_a_newer_loss_of_another_machine_does_not_take_the_times() -> None:
    rows = [TIME, elsewhere(LOSS)]
    assert speaker(rows) == "m1"
    assert speaking(rows) == tuple(rows)
    assert other_machines(rows) == "Records of 2 machines: m1 speaks; 1 of others hold on any machine and count."
    assert other_machines([rows[1], replace(LOSS, seed=1)]) == "Records of 2 machines, which hold on any."


def test_a_loss_that_failed_elsewhere_is_not_forgotten() -> None:
    lost = replace(LOSS, seed=7, value=None, error="diverged", n=0)
    rows = [LOSS, lost, elsewhere(LOSS, seed=1), elsewhere(TIME)]
    assert speaking(rows) == tuple(rows)


def test_of_one_point_the_newest_machine_counts() -> None:
    assert speaking([LOSS, TIME, elsewhere(LOSS)]) == (LOSS, TIME, elsewhere(LOSS)), "the machine's own stays its own"
    assert speaking([elsewhere(LOSS), LOSS, TIME]) == (LOSS, TIME)
    assert speaking([LOSS, elsewhere(LOSS)]) == (elsewhere(LOSS),)
