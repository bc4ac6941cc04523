"""The glossary in bench/README.md, written from the table of metrics: `python -m bench.glossary [--check]`.

Exit code 0 when the text is fresh (or was written), 1 when `--check` finds it stale.
"""

import argparse
import sys
from pathlib import Path

from bench.metrics import METRICS, Metric

README = Path(__file__).parent / "README.md"
BEGIN = "<!-- begin glossary: python -m bench.glossary -->"
END = "<!-- end glossary -->"


def table(metrics: tuple[Metric, ...] = METRICS) -> str:
    """The metrics as a table in Markdown."""
    head = "| metric | unit | better | noise | transfers | formula | how it errs |\n|---|---|---|---|---|---|---|\n"
    return head + "".join(f"| {' | '.join(_cells(metric))} |\n" for metric in metrics)


def refresh(text: str) -> str:
    """The text with the glossary in it replaced by the table."""
    return between(text, BEGIN, END, table())


def between(text: str, begin: str, end: str, lines: str) -> str:
    """The text with what stands between two markers replaced.

    Raises:
        ValueError: a marker is missing.
    """
    before, first, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    if not (first and last):
        raise ValueError(f"{README.name}: has no line {begin if not first else end!r}; put both markers back")
    return f"{before}{begin}\n{lines}{end}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Write or check the glossary."""
    parser = argparse.ArgumentParser(prog="python -m bench.glossary", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the glossary is stale")
    check = parser.parse_args(arguments).check
    text = README.read_text()
    fresh = refresh(text)
    if check and fresh != text:
        print(f"{README}: the glossary is stale; run `python -m bench.glossary`")
        return 1
    if not check:
        README.write_text(fresh)
    return 0


def _cells(metric: Metric) -> tuple[str, ...]:
    transfers = "yes" if metric.transfers else "this machine"
    return (
        f"`{metric.name}`",
        metric.unit,
        metric.better,
        metric.noise,
        transfers,
        metric.formula.replace("|", "\\|"),
        metric.bias.replace("|", "\\|"),
    )


if __name__ == "__main__":
    sys.exit(main())
