"""The gate with an expectations file of the test's own."""

from pathlib import Path

import pytest

from bench import gate, instructions
from dsv3.attention.kernels import blocks
from tests.bench.gated import FIGURES


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An expectations file of its own, with FIGURES accepted for this key; no instructions are counted."""
    path = tmp_path / "expectations.json"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(instructions, "why_not", lambda: "no valgrind")
    monkeypatch.setattr(blocks, "why_not", lambda: None)
    monkeypatch.setattr(gate, "EXPECTATIONS", path)
    monkeypatch.setattr(gate, "measure", lambda: FIGURES)
    assert gate.main(["--accept", "--reason", "first"]) == 0
    return path
