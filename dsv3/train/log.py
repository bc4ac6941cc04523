"""The log of a run: one JSON object per line, with its kind.

    {"kind": "run", ...}           config, seed, corpus, what was skipped, baselines
    {"kind": "step", ...}          a StepReport
    {"kind": "validation", ...}    an Evaluation; {"kind": "test", ...} at the end

A line is flushed when it is written. A run that goes on from a checkpoint drops the lines after it, and a last line
that a kill cut in two, so that the log always reads as that of one unbroken run.
"""

import json
import os
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from dsv3.train.evaluate import Evaluation
from dsv3.train.step import StepReport

T = TypeVar("T", StepReport, Evaluation)


class Log:
    """Lines of one run, kept in memory and, given a path, on disk."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lines: list[dict[str, Any]] = []

    def resume(self, step: int) -> None:
        """Take over the lines on disk up to `step`, and drop the others from it."""
        assert self._path is not None, "a run that resumes has a folder"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        parsed = [line for line in map(_parsed, lines) if line is not None and line["kind"] in ("step", "validation")]
        self._lines = [line for line in parsed if line["step"] <= step]
        kept = self._path.with_suffix(".partial")
        kept.write_text("".join(json.dumps(line) + "\n" for line in self._lines))
        os.replace(kept, self._path)

    def write(self, kind: str, **content: Any) -> None:
        """Add a line."""
        line = {"kind": kind, **content}
        self._lines.append(line)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def record(self, kind: str, value: StepReport | Evaluation) -> None:
        """Add a line with the fields of a report."""
        self.write(kind, **asdict(value))

    def reports(self) -> tuple[StepReport, ...]:
        """The steps so far, those before a resume included."""
        fields = [{**line, "max_vio": tuple(line["max_vio"])} for line in self._of("step")]
        return tuple(StepReport(**line) for line in fields)

    def skipped_in_a_row(self) -> int:
        """How many of the last updates were skipped without one that was not."""
        steps = (line for line in reversed(self._lines) if line["kind"] == "step")
        return sum(1 for _ in takewhile(lambda line: line["health"] != "ok", steps))

    def validations(self) -> tuple[Evaluation, ...]:
        """The evaluations on the validation split so far."""
        return tuple(Evaluation(**line) for line in self._of("validation"))

    def _of(self, kind: str) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if k != "kind"} for line in self._lines if line["kind"] == kind]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except json.JSONDecodeError:
        return None
    return parsed if isinstance(parsed, dict) and "kind" in parsed else None
