"""What we ask: one file per study, the runner, and the ledger of claims.

study.py          a study declared as data, with an example at its head
claims.py         the ledger claims.toml, and what a verdict is
evidence.py       from records to an estimate with its interval, and to a verdict
traced.py         numbers that know their records
verdicts.py       the verdict on every claim, from the records that are there
difference.py     what an arm changes against the baseline, and what is then not matched
significance.py   tests on paired differences: effect, no harm, what could be seen
comparison.py     every arm against the baseline, as a family of tests
designs.py        arms from factors: one at a time, factorial, fractional; effects with their aliases
tuning.py         the same tuning budget for every arm, on seeds and text of its own
catalogue.py      a study by its name or path
run.py            every cell in a fresh process (cell.py), once (cache.py, and code.py: what code a result depends on)
ray_cluster.py    the same cells as tasks of a Ray cluster
adopt.py          finished cells outlive a change of code that changes no figure
balance_methods.py, capacity_cells.py   what two studies of experts share, and what a third has too much of for one
                  file; answers and pictures alone: moe_balance_answer.py, capacity_curves.py,
                  moe_balance_pictures.py, load_maps.py, moe_recovery_answer.py, moe_recovery_pictures.py,
                  routing_workloads_answer.py, routing_workloads_pictures.py, attention_hierarchical_pictures.py
equal_time.py     language models compared when equal CPU time has passed
STUDIES           the studies, in the order of the report

Run by their paths alone, as the report has a time budget: attention_quality.py, attention_axes.py and
attention_language.py, which train many models, multi_token_tuned.py, which tunes every arm, and moe_factorial.py, a
factorial design. A report on a folder that has records of them has their pages.
"""

STUDIES: tuple[str, ...] = (
    "attention_sparsity",
    "attention_hierarchical",
    "attention_choosing",
    "attention_indexer",
    "attention_gpu",
    "moe_speed",
    "moe_gpu",
    "routing_workloads",
    "moe_balance",
    "moe_recovery",
    "moe_capacity",
    "moe_isolation",
    "precision_modes",
    "pipeline_bubble",
    "latent_attention",
    "multi_token",
)
