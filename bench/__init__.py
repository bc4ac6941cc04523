"""How dsv3 measures: the table of metrics, records, meters, the benchmark cases and the regression gate.

    meter -> Measurement --record(point, provenance, measurement)--> Record --append--> records.jsonl

record.py       Record, append, load: one figure as one JSON line
metrics.py      METRICS: what each figure means, which way is better, how it misleads
measurement.py  Measurement, Point, record, failure: from a meter's figure to a record
fingerprint.py  Provenance, provenance, fingerprint, machine_id, revision
meters/         paired times, peak bytes, saved bytes, FLOPs, routing load, ceilings of the machine, energy
interval.py     95% intervals of small samples; speed.py, peaks.py: rates, and peaks of cards by name
cases.py        what a case does with its arms; conftest.py gives it to pytest as fixtures
bench_*.py      the cases, one file per room
attention.py    (its sizes without torch: attention_sizes.py), decoding.py, indexed_attention.py, training.py,
                forced_balance.py, capacity.py, routed_training.py, collapsed_routing.py, gradient_paths.py: what the
                studies measure, and cases too; expert_layers.py, with its routing of real text: text_routing.py
crossover.py, fastest.py   measure what code chooses by and write it to its tables (measured_table.py)
routing_workloads.py   routing from a name and a seed; workload_loads.py: what it does to experts; placed_loads.py: what
                placing experts takes off the busiest rank (its sizes without torch: workload_sizes.py)

__main__.py     runs the cases; replicate.py joins the records of fresh processes
budget/         what true-size models take: by arithmetic, traced on fake tensors, and where it fits on real memory
gate.py         exact figures (structure.py and compiled.py measure them, of variants.py) against expectations.json, and
                instructions.py against another revision's (instrumented.py runs inside valgrind); differences.py;
                stability.py: do the figures repeat?
ab/             the working tree's times against a revision's, in pairs of fresh processes
pytest_gate.py  the exact figures of any step in anyone's repository, as a pytest fixture

The first four do not import torch, and neither does this file.

To add a case, write `bench_<what>` in `bench/bench_<room>.py`; bench_layers.py is the form to copy:

    def bench_window(measure_arms, keep, device, profile):
        # docstring: what against what, in which phase
        sdpa, window = ...                                      # callables without arguments, ready to run on `device`
        def check(): torch.testing.assert_close(...)            # before any timing; raises where an arm is wrong
        measure_arms(phase="forward",                           # forward | forward_backward | step | decode
                     baseline="sdpa", arms={"sdpa": sdpa, "window": window}, check=check,
                     axes={"length": length},
                     tokens=length, flops=operations)           # add tokens per second; share of ceiling, MFU on a GPU
        keep("window", [measurement, ...], baseline="sdpa", axes={"length": length})     # figures of other meters

`measure_arms` returns the figures, `figures["window"]["forward_cpu_ratio"].value`. Run one file by
`python -m pytest bench/bench_layers.py --bench-profile quick --bench-out DIR`, all of them by `python -m bench`.
"""
