"""What we ask: one file per study, the runner, and the ledger of claims.

study.py      a study declared as data, with an example at its head
claims.py     the ledger claims.toml, and what a verdict is
evidence.py   from records to an estimate with its interval, and to a verdict
verdicts.py   the verdict on every claim, from the records that are there
catalogue.py  a study by its name or path
run.py        every cell in a fresh process (cell.py), once (cache.py, and code.py: what code a result depends on)
STUDIES       the studies, in the order of the report
"""

STUDIES: tuple[str, ...] = (
    "attention_sparsity",
    "moe_capacity",
    "precision_modes",
    "pipeline_bubble",
    "latent_attention",
    "multi_token",
)
