"""How dsv3 measures: the table of metrics, records, meters, the benchmark cases and the regression gate.

    meter -> Measurement --record(point, provenance, measurement)--> Record --append--> records.jsonl

record.py       Record, append, load: one figure as one JSON line
metrics.py      METRICS: what each figure means, which way is better, how it misleads
measurement.py  Measurement, Point, record, failure: from a meter's figure to a record
fingerprint.py  Provenance, provenance, fingerprint, machine_id, revision

Those four do not import torch, and neither does this file.
"""
