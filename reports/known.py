"""Records that speak of what this version knows: its studies, their arms, and its metrics. Others are counted."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ablations.catalogue import every
from ablations.code import ROOT
from ablations.study import Study
from bench.metrics import METRICS
from bench.record import Record, load


def recorded(out: Path, others: Sequence[str] = ()) -> tuple[Study, ...]:
    """The studies of a report on that folder: those of the list, others by name or path, and of those that are run by
    their paths alone the ones that have records there.

    Raises:
        ValueError: as `ablations.catalogue.every`.
    """
    studies = every(others)
    names = {row.study for row in load(out / "records.jsonl").records} - {study.name for study in studies}
    paths = (ROOT / "ablations" / f"{name}.py" for name in sorted(names))
    return every((*others, *(str(path) for path in paths if path.is_file())))


def known(records: Sequence[Record], studies: Sequence[Study] = ()) -> tuple[list[Record], str]:
    """The records of known metrics and arms in their order, and in a sentence what the others are of; "" for none."""
    arms = {study.name: {arm.name for arm in study.arms} for study in studies}
    metrics = {row.name for row in METRICS}
    kept, strange = [], Counter[str]()
    for record in records:
        if record.metric not in metrics:
            strange[f"metric {record.metric!r}"] += 1
        elif record.arm not in arms.get(record.study, {record.arm}):
            strange[f"arm {record.arm!r} of {record.study}"] += 1
        else:
            kept.append(record)
    named = ", ".join(f"{what} ({count})" for what, count in strange.items())
    said = f"{strange.total()} records are of what this version does not know and were left out: {named}."
    return kept, said if strange else ""
