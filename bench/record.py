"""A record: one measured figure with everything that says what was measured, as one JSON line with sorted keys.

A figure without its arm, seed, config, machine and revision cannot be compared with another, so they travel together.
Files only grow: a record is appended whole or not at all, and a run killed at any instant costs at most the line it was
writing. Reading never fails on a bad line, whatever its bytes; it names it, and `Loaded.left_out` counts them. A
measurement that failed is a record too, with `error` in place of a value.

Lines with equal `id` measure the same thing again; the later one stands.
"""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

SCHEMA = 1
_REASON = 200  # characters of a reason, of both ends: a foreign line can be as long as a file
_SHOWN = 5  # lines that are named one by one; a foreign file has as many bad lines as it has lines

Noise = Literal["exact", "paired", "absolute"]
Profile = Literal["quick", "full"]
Over = Literal["blocks", "calls", "processes", "seeds", "windows"]

_IDENTITY = (
    "study",
    "baseline",
    "arm",
    "seed",
    "metric",
    "axes",
    "config",
    "corpus",
    "machine",
    "revision",
    "profile",
    "rule",
)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One figure: what was asked (study, arm, metric, axes), what came out (value, n, interval), where it comes from.

    value     finite, or None when `error` says why there is none
    n         samples behind the value and its interval; 0 for an error
    over      what the n samples are: blocks of interleaved arms, calls, fresh processes, seeds, windows of a sensor
    interval  (low, high) at 95%, or None
    noise     "exact": equal on every run; "paired": a ratio of interleaved arms; "absolute": this machine, this hour
    samples   the n samples, or None
    config    digest of the run's config; corpus: digest of the text it read; rule: digest of the rule of verdict
    axes      what else identifies the point, such as {"length": 4096}
    """

    study: str
    arm: str
    metric: str
    unit: str
    noise: Noise
    value: int | float | None
    n: int
    machine: str
    revision: str
    profile: Profile
    time: str
    baseline: str | None = None
    seed: int | None = None
    over: Over | None = None
    interval: tuple[float, float] | None = None
    samples: tuple[float, ...] | None = None
    config: str | None = None
    corpus: str | None = None
    rule: str | None = None
    error: str | None = None
    axes: Mapping[str, str | int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("study", "arm", "metric", "machine", "revision", "time"):
            _require(isinstance(getattr(self, name), str) and getattr(self, name) != "", self, name, "must be text")
        _require(isinstance(self.unit, str), self, "unit", 'must be text ("" for a pure number)')
        _require(self.noise in get_args(Noise), self, "noise", f"must be one of {', '.join(get_args(Noise))}")
        _require(self.profile in get_args(Profile), self, "profile", "must be quick or full")
        over = (None, *get_args(Over))
        _require(self.over in over, self, "over", f"must be None or one of {', '.join(get_args(Over))}")
        for name in ("baseline", "config", "corpus", "rule", "error"):
            text = getattr(self, name)
            _require(text is None or (isinstance(text, str) and text != ""), self, name, "must be text or None")
        whole = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        _require(self.seed is None or whole, self, "seed", "must be a whole number or None")
        self._check_value()
        self._check_axes()

    def _check_value(self) -> None:
        measured = self.error is None
        _require(
            _finite(self.value) if measured else self.value is None,
            self,
            "value",
            "must be a finite number, or None beside an error",
        )
        whole = isinstance(self.n, int) and not isinstance(self.n, bool)
        _require(whole and self.n >= (1 if measured else 0), self, "n", "must be at least 1 (0 for an error)")
        if self.interval is not None:
            ordered = len(self.interval) == 2 and all(map(_finite, self.interval))
            ordered = ordered and self.interval[0] <= self.interval[1]
            _require(ordered, self, "interval", "must be (low, high), finite and ordered")
        if self.samples is not None:
            agree = len(self.samples) == self.n and all(map(_finite, self.samples))
            _require(agree, self, "samples", f"must be n={self.n} finite numbers")

    def _check_axes(self) -> None:
        for name, value in self.axes.items():
            plain = isinstance(name, str) and (isinstance(value, str) or _finite(value))
            _require(plain, self, "axes", "must map names to text or finite numbers")

    @cached_property
    def id(self) -> str:
        """Twelve hexadecimal digits that name what was measured, whatever came out: reports point at a figure by it."""
        identity = {name: getattr(self, name) for name in _IDENTITY} | {"axes": dict(self.axes)}
        return sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A line that is no record: its number in the file, from 1, and why."""

    line: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a file of records holds: the records in file order, and the lines that are none."""

    records: tuple[Record, ...]
    skipped: tuple[Skipped, ...]

    @property
    def left_out(self) -> str:
        """The lines that are no records as one sentence: how many, and of the first few which and why; "" for none."""
        if not self.skipped:
            return ""
        lines = len(self.records) + len(self.skipped)
        named = "; ".join(f"line {line.line} ({line.reason})" for line in self.skipped[:_SHOWN])
        more = f"; and {len(self.skipped) - _SHOWN} more" if len(self.skipped) > _SHOWN else ""
        return f"{len(self.skipped)} of {lines} lines are no records and were left out: {named}{more}."


def to_line(record: Record) -> str:
    """The record as one line of JSON, keys sorted, without the line's end."""
    plain = {f.name: getattr(record, f.name) for f in fields(record)}
    plain |= {"axes": dict(record.axes), "id": record.id, "schema": SCHEMA}
    return json.dumps(plain, sort_keys=True, allow_nan=False)


def from_line(line: str) -> Record:
    """Read back what `to_line` wrote; the result equals the original.

    Raises:
        ValueError: a line that is not JSON, is of another schema, lacks or adds a field, holds a bad value, or whose id
            does not match its content.
    """
    plain = json.loads(line, parse_constant=_refuse_constant)
    if not isinstance(plain, dict):
        raise ValueError("not an object with the fields of a record")
    schema = plain.pop("schema", None)
    if isinstance(schema, int) and schema > SCHEMA:
        raise ValueError(f"schema={schema}: newer than {SCHEMA}, which this dsv3 reads; update dsv3")
    if schema != SCHEMA:
        raise ValueError(f"schema={schema!r}: must be {SCHEMA}")
    identity = plain.pop("id", None)
    differing = sorted(plain.keys() ^ {f.name for f in fields(Record)})
    if differing:
        raise ValueError(f"missing or unknown fields: {', '.join(differing)}")
    record = Record(**_tuples(plain))
    if record.id != identity:
        raise ValueError(f"id={identity!r}: its content has id {record.id}; was the line edited?")
    return record


def append(path: Path | str, records: Iterable[Record]) -> None:
    """Add records at the end of the file, as `append_lines` does."""
    lines = "".join(to_line(record) + "\n" for record in records)
    if lines:
        append_lines(path, lines)


def append_lines(path: Path | str, lines: str) -> None:
    """Add whole lines at the end of the file, all or none, on disk when this returns; the folder is made.

    An unfinished last line, left by a crash of an earlier writer, is closed first: it cannot swallow one of these.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        data = (_close_torn_line(handle) + lines).encode()
        # One write: the system keeps concurrent appends of a local file apart, so that lines of two runs never mix.
        written = os.write(handle, data)
        if written != len(data):
            _take_back(handle, written)
            raise OSError(f"{path}: only {written} of {len(data)} bytes could be written; is the disk full?")
        os.fsync(handle)
    finally:
        os.close(handle)


def load(path: Path | str) -> Loaded:
    """The records of a file, and the lines that are none, each with its reason. A missing file holds nothing."""
    path = Path(path)
    records, skipped = [], []
    data = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(from_line(line.decode()))
        except RecursionError:  # brackets nested a thousand deep are JSON, but nobody's record
            skipped.append(Skipped(line=number, reason="nested too deep to be a record"))
        except (ValueError, TypeError) as error:
            skipped.append(Skipped(line=number, reason=_short(str(error))))
    return Loaded(records=tuple(records), skipped=tuple(skipped))


def _take_back(handle: int, written: int) -> None:
    """Cut off what a full disk let through, unless somebody has written behind it."""
    end = os.lseek(handle, 0, os.SEEK_CUR)
    if os.fstat(handle).st_size == end:
        os.ftruncate(handle, end - written)


def _short(reason: str) -> str:
    half = _REASON // 2
    return reason if len(reason) <= _REASON else f"{reason[:half]} ... {reason[-half:]}"


def _close_torn_line(handle: int) -> str:
    size = os.fstat(handle).st_size
    return "\n" if size and os.pread(handle, 1, size - 1) != b"\n" else ""


def _tuples(plain: dict[str, Any]) -> dict[str, Any]:
    lists = [name for name in ("interval", "samples") if plain[name] is not None]
    for name, kind, said in (*((name, list, "a list") for name in lists), ("axes", dict, "an object")):
        if not isinstance(plain[name], kind):
            raise ValueError(f"{name}={plain[name]!r}: must be {said}")
    return plain | {name: tuple(plain[name]) for name in lists}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no finite number")


def _finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max  # false of NaN, and of whole numbers that no float can hold


def _require(holds: bool, record: Record, name: str, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name}={getattr(record, name)!r}: {rule}; in the record of {record.metric!r}")
