"""Records: what goes in comes out, what is bad is named, and a writer killed at any instant costs one line at most."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.record import SCHEMA, Record, append, from_line, load, to_line

ROOT = Path(__file__).parents[2]
PLAIN = Record(
    study="moe_capacity",
    arm="1.2",
    baseline="dropless",
    seed=0,
    metric="drop_share",
    unit="share",
    noise="exact",
    value=0.125,
    n=3,
    over="seeds",
    interval=(0.1, 0.2),
    samples=(0.1, 0.125, 0.2),
    machine="8626a598a4c9",
    revision="ad36caf",
    profile="quick",
    time="2026-01-01T00:00:00+00:00",
    axes={"factor": 1.2},
)

names = st.text(min_size=1, max_size=20)
numbers = st.one_of(st.integers(-(2**60), 2**60), st.floats(allow_nan=False, allow_infinity=False))
maybe = st.none() | names


@st.composite
def records(draw: st.DrawFn) -> Record:
    samples = draw(st.none() | st.lists(numbers, min_size=1, max_size=5).map(tuple))
    failed = draw(st.booleans())
    interval = draw(st.none() | st.tuples(numbers, numbers).map(lambda pair: (min(pair), max(pair))))
    return Record(
        study=draw(names),
        arm=draw(names),
        metric=draw(names),
        unit=draw(st.text(max_size=10)),
        noise=draw(st.sampled_from(("exact", "paired", "absolute"))),
        value=None if failed else draw(numbers),
        error=draw(names) if failed else None,
        n=len(samples) if samples else draw(st.integers(0 if failed else 1, 100)),
        over=draw(st.sampled_from((None, "blocks", "calls", "processes", "seeds", "windows"))),
        interval=interval,
        samples=samples,
        machine=draw(names),
        revision=draw(names),
        profile=draw(st.sampled_from(("quick", "full"))),
        time=draw(names),
        baseline=draw(maybe),
        seed=draw(st.none() | st.integers()),
        config=draw(maybe),
        corpus=draw(maybe),
        rule=draw(maybe),
        axes=draw(st.dictionaries(names, st.text() | numbers, max_size=3)),
    )


@given(records())
def test_a_line_reads_back_as_the_record_it_was_made_of(record: Record) -> None:
    line = to_line(record)
    assert "\n" not in line
    assert from_line(line) == record


def test_a_line_has_sorted_keys_and_its_schema() -> None:
    keys = list(json.loads(to_line(PLAIN)))
    assert keys == sorted(keys)
    assert {"id", "schema", "study", "axes", "rule"} <= set(keys)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"value": float("nan")}, "value=nan"),
        ({"value": float("inf")}, "value=inf"),
        ({"value": None}, "value=None"),
        ({"value": True}, "value=True"),
        ({"error": "out of memory"}, "value=0.125"),
        ({"n": 0}, "n=0"),
        ({"n": 2}, "samples="),
        ({"interval": (0.2, 0.1)}, "interval="),
        ({"interval": (0.1, float("inf"))}, "interval="),
        ({"noise": "loud"}, "noise='loud'"),
        ({"profile": "huge"}, "profile='huge'"),
        ({"over": "nights"}, "over='nights'"),
        ({"arm": ""}, "arm=''"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"axes": {"length": None}}, "axes="),
        ({"axes": {"length": float("nan")}}, "axes="),
        ({"value": 10**400}, "value=1000"),
        ({"samples": (0.1, float("nan"), 0.2)}, "samples="),
        ({"seed": True}, "seed=True"),
    ],
)
def test_a_bad_value_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match="in the record of 'drop_share'") as refused:
        replace(PLAIN, **change)
    assert str(refused.value).startswith(named)


def test_an_error_record_needs_no_samples() -> None:
    failed = replace(PLAIN, value=None, error="parity: off by 1", n=0, samples=None, interval=None)
    assert from_line(to_line(failed)) == failed


def test_the_id_names_what_was_measured_and_not_what_came_out() -> None:
    again = replace(PLAIN, value=0.25, samples=(0.2, 0.25, 0.3), time="2026-01-02T00:00:00+00:00")
    elsewhere = replace(PLAIN, axes={"factor": 1.25})
    assert again.id == PLAIN.id != elsewhere.id


def test_appended_records_load_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "records.jsonl"
    second = replace(PLAIN, seed=1)
    append(path, [PLAIN])
    append(path, [])
    append(path, [second, PLAIN])
    assert load(path).records == (PLAIN, second, PLAIN)
    assert load(path).skipped == ()


def test_a_missing_file_holds_nothing(tmp_path: Path) -> None:
    assert load(tmp_path / "none.jsonl").records == ()


def test_bad_lines_are_named_and_counted_and_cost_no_good_one(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    good = to_line(PLAIN)
    plain = json.loads(good)
    bad = {
        "schema=99: newer": json.dumps(plain | {"schema": SCHEMA + 98}),
        "schema=None": json.dumps({key: plain[key] for key in plain if key != "schema"}),
        "unknown fields: colour": json.dumps(plain | {"colour": "red"}),
        "fields: value": json.dumps({key: plain[key] for key in plain if key != "value"}),
        "edited": json.dumps(plain | {"arm": "1.3"}),
        "no finite number": good.replace("0.125", "NaN", 1),
        "not an object": "[1, 2]",
        "Expecting": "{torn",
        "can't decode": "\udcff",
        "must be an object": json.dumps(plain | {"axes": [1]}),
        "interval=5: must be a list": json.dumps(plain | {"interval": 5}),
        "samples='012': must be a list": json.dumps(plain | {"samples": "012"}),
        "must be a finite number": json.dumps(plain | {"value": 10**400}),
        "Exceeds the limit": good.replace('"n": 3', '"n": ' + "3" * 5000),
        "nested too deep": "[" * 100_000,
        "char 0": "\0" * 4096,  # what a power cut leaves at the end of a file on some systems
    }
    lines = [good, *bad.values(), "", good]
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    loaded = load(path)
    assert loaded.records == (PLAIN, PLAIN)
    assert [skipped.line for skipped in loaded.skipped] == list(range(2, 2 + len(bad)))
    for reason, skipped in zip(bad, loaded.skipped, strict=True):
        assert reason in skipped.reason
        assert len(skipped.reason) < 300
    said = loaded.left_out
    assert said.startswith(f"{len(bad)} of {len(bad) + 2} lines are no records and were left out: line 2 (schema=99")
    assert said.endswith(f"; and {len(bad) - 5} more.")
    assert len(said) < 2000


@given(st.lists(st.binary(max_size=40), max_size=6), st.integers(0, 5))
def test_no_bytes_keep_a_record_from_being_read(foreign: list[bytes], at: int) -> None:
    lines = [line for junk in foreign for line in junk.split(b"\n")]
    with NamedTemporaryFile() as file:
        file.write(b"\n".join([*lines[:at], to_line(PLAIN).encode(), *lines[at:]]))
        file.flush()
        loaded = load(file.name)
    assert loaded.records == (PLAIN,)
    assert len(loaded.skipped) == sum(bool(line.strip()) for line in lines)


@pytest.mark.parametrize("data", [b"", b"\n", b"\n\r\n  \n"])
def test_a_file_without_a_line_holds_nothing_and_complains_of_nothing(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "records.jsonl").write_bytes(data)
    loaded = load(tmp_path / "records.jsonl")
    assert (loaded.records, loaded.skipped, loaded.left_out) == ((), (), "")


def test_lines_that_end_as_on_windows_are_records(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_bytes((to_line(PLAIN) + "\r\n").encode() * 2)
    assert load(tmp_path / "records.jsonl").records == (PLAIN, PLAIN)


def test_a_line_cut_anywhere_is_one_bad_line_and_its_neighbours_stand(tmp_path: Path) -> None:
    path, line = tmp_path / "records.jsonl", to_line(PLAIN)
    for cut in range(1, len(line)):
        path.write_bytes(f"{line}\n{line[:cut]}".encode())
        append(path, [PLAIN])
        loaded = load(path)
        assert loaded.records == (PLAIN, PLAIN)
        assert [skipped.line for skipped in loaded.skipped] == [2]


def test_a_torn_last_line_is_closed_before_the_next_record(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append(path, [PLAIN])
    with path.open("a") as file:
        file.write(to_line(PLAIN)[:40])
    append(path, [replace(PLAIN, seed=7)])
    loaded = load(path)
    assert [record.seed for record in loaded.records] == [0, 7]
    assert [skipped.line for skipped in loaded.skipped] == [2]


WRITER = """
import sys
from dataclasses import replace
from bench.record import append, load
template = load(sys.argv[1]).records[0]
for seed in range(10**9):
    append(sys.argv[2], [replace(template, seed=seed, arm=str(part) * 500) for part in range(3)])
    print(seed, flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that cannot be caught")
def test_a_writer_killed_at_any_instant_loses_nothing_that_it_confirmed(tmp_path: Path) -> None:
    template, path = tmp_path / "template.jsonl", tmp_path / "records.jsonl"
    append(template, [PLAIN])
    command = [sys.executable, "-c", WRITER, str(template), str(path)]
    for round_number in range(3):
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(0.01 * (round_number + 1))
            writer.kill()
            confirmed = 1 + len([line for line in writer.stdout.read().splitlines(keepends=True) if line[-1] == "\n"])
        before = len(load(path).records)
        append(path, [PLAIN])
        loaded = load(path)
        assert len(loaded.records) == before + 1
        assert len(loaded.skipped) <= round_number + 1
        assert before >= 3 * confirmed
    assert loaded.records[-1] == PLAIN


LIMITED = """
import resource, sys
from dataclasses import replace
from bench.record import append, load
template = load(sys.argv[1]).records[0]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    append(sys.argv[2], [replace(template, seed=seed) for seed in range(1, 4)])
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
@pytest.mark.parametrize("room", [0, 0.1, 1.2, 2.9])  # lines that still fit
def test_a_full_disk_is_said_and_leaves_the_file_as_it_was(tmp_path: Path, room: float) -> None:
    path = tmp_path / "records.jsonl"
    append(path, [PLAIN])
    before = path.read_bytes()
    command = [sys.executable, "-c", LIMITED, str(path), str(path), str(int(len(before) * (1 + room)))]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "is the disk full?" in said or "File too large" in said
    assert path.read_bytes() == before
    append(path, [PLAIN])
    assert load(path).records == (PLAIN, PLAIN)


MANY = """
import sys
from dataclasses import replace
from bench.record import append, load
template = load(sys.argv[1]).records[0]
print("ready", flush=True)
input()
for seed in range(500):
    append(sys.argv[2], [replace(template, seed=seed, arm=sys.argv[3] * (1 + seed % 700))])
"""


def test_two_processes_append_500_records_each_and_none_is_lost_or_torn(tmp_path: Path) -> None:
    template, path = tmp_path / "template.jsonl", tmp_path / "records.jsonl"
    append(template, [PLAIN])
    command = [sys.executable, "-c", MANY, str(template), str(path)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    writers = [subprocess.Popen([*command, name], **pipes) for name in "ab"]
    for writer in writers:
        writer.stdout.readline()  # both have started before either writes
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate()
    assert [writer.returncode for writer in writers] == [0, 0]
    loaded = load(path)
    assert loaded.skipped == ()
    for name in "ab":
        assert [record.seed for record in loaded.records if record.arm[0] == name] == list(range(500))


def test_a_hundred_thousand_lines_load_in_seconds_of_cpu_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, lines = tmp_path / "records.jsonl", 100_000
    line = to_line(PLAIN)
    path.write_text((f"{line}\n" * 99 + line[:40] + "\n") * (lines // 100))
    started = time.process_time()
    loaded = load(path)
    took = time.process_time() - started
    print(f"{lines} lines of {len(line)} bytes: {took:.1f} s of CPU time")
    assert (len(loaded.records), len(loaded.skipped)) == (99_000, 1000)
    assert took < 60  # ten times what it takes on one slow core: a load that grows faster than the file does not pass


def test_a_folder_that_cannot_be_made_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        append(tmp_path / "file" / "records.jsonl", [PLAIN])
