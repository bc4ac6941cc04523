"""Records that speak of what this version knows: its metrics, and of its own studies their arms. Others are counted."""

from collections import Counter
from collections.abc import Sequence

from ablations.study import Study
from bench.metrics import METRICS
from bench.record import Record


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
