"""One cell, run in a process of its own by `ablations.run`: `python -m ablations.cell` with the order as a line on
standard input.

A fresh process gives every cell the same allocator, caches and threads to start from, and an arm that dies takes no
other with it. The parent holds our standard input open; when it closes, the parent is gone, and so are we: an orphan
would disturb the next run's timings.
"""

import json
import os
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ablations.cache import cell_key, mark
from ablations.catalogue import load
from ablations.study import Cell, Reading, Study
from bench.fingerprint import Provenance, provenance
from bench.measurement import Point, failure, record
from bench.record import Profile, Record, append
from dsv3.config import digest

PENDING = "pending: "  # how the error of a reading begins that this machine cannot measure: no failure
READINGS_FAILED = 3  # the exit status when records say what failed; any other than 0 means that there are no records


def order(study: str, cell: Cell, profile: Profile, out: Path) -> str:
    """What the parent writes to our standard input."""
    return json.dumps({"study": study, "cell": asdict(cell), "profile": profile, "out": str(out)})


def main() -> int:
    """Measure the cell, append its records, and mark it done unless a reading failed."""
    order: dict[str, Any] = json.loads(sys.stdin.readline())
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    study, cell, profile = load(order["study"]), Cell(**order["cell"]), order["profile"]
    out = Path(order["out"])
    key = cell_key(study, cell, profile)
    started = time.perf_counter()
    readings = study.measure(cell)
    labels = {corpus: provenance(profile, corpus) for corpus in {reading.corpus for reading in readings}}
    rule = study.rule_digest()
    records = [to_record(study, cell, reading, labels[reading.corpus], rule) for reading in readings]
    append(out / "records.jsonl", records)
    failed = [f"{row.arm}: {row.error}" for row in records if row.error and not row.error.startswith(PENDING)]
    if failed:
        print("\n".join(failed))
        return READINGS_FAILED
    mark(out, key, records, time.perf_counter() - started)
    return 0


def to_record(study: Study, cell: Cell, reading: Reading, where: Provenance, rule: str | None) -> Record:
    """A reading with everything that identifies it; one that is no finite number becomes an error that names it.

    Raises:
        ValueError: a reading of an arm or a metric that the study does not declare.
    """
    arm = study.arm(reading.arm)
    point = Point(
        study=study.name,
        arm=arm.name,
        baseline=study.baseline,
        seed=cell.seed,
        config=reading.config or (None if arm.config is None else digest(arm.config)),
        rule=rule,
        axes={"device": cell.device} | dict(cell.axes) | dict(reading.axes),
    )
    name = reading.metric if reading.measurement is None else reading.measurement.metric
    if name not in study.metrics:
        raise ValueError(f"metric={name!r}: must be one of {', '.join(study.metrics)}; declare it in {study.name}")
    if reading.measurement is None:
        return failure(point, where, name, reading.failed or f"{PENDING}{reading.pending}")
    return record(point, where, reading.measurement)


def _leave_with_parent() -> None:
    # Not sys.stdin.read(): its lock, held by this thread when the interpreter shuts down, would abort the process.
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
