"""The fingerprint is JSON, its machine stays the same, and an edit of measuring code is another revision."""

import json
import subprocess
from pathlib import Path

import pytest

from bench import fingerprint


def test_the_fingerprint_is_json_and_names_machine_and_revision() -> None:
    told = json.loads(json.dumps(fingerprint.fingerprint(corpus="c0ffee")))
    assert told["machine"] == fingerprint.machine_id()
    assert told["revision"] == fingerprint.revision()
    assert told["corpus"] == "c0ffee"
    assert told["cores"] >= 1
    assert told["torch"]


def test_load_does_not_change_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint.machine_id()
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 99.0, 99.0))
    assert fingerprint.machine_id() == before


def test_which_dispatch_experts_take_is_told_stays_known_and_makes_no_other_machine(tmp_path: Path) -> None:
    def told(**given: dict[str, str]) -> object:
        fingerprint.save(tmp_path, **given)
        return fingerprint.saved(tmp_path, fingerprint.machine_id())["expert_dispatch"]

    assert told() is None, "nobody has asked"
    for taken in ({"float32 training": "kernel"}, {"float32 training": "looped"}):
        assert told(experts=taken) == taken
        assert told() == taken, "a run without experts leaves it"
    assert len(list((tmp_path / "machines").iterdir())) == 1


def test_another_torch_is_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint.machine_id()
    monkeypatch.setattr(fingerprint, "version", lambda package: "2.99.0")
    assert fingerprint.machine_id() != before


def test_a_processor_that_can_do_less_is_another_machine_though_it_has_the_same_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = fingerprint.machine_id()
    monkeypatch.setattr(fingerprint, "instruction_sets", lambda: ["another"])
    assert fingerprint.machine_id() != before


def test_the_fingerprint_is_saved_under_the_machine(tmp_path: Path) -> None:
    path = fingerprint.save(tmp_path)
    assert path == tmp_path / "machines" / f"{fingerprint.machine_id()}.json"
    assert json.loads(path.read_text())["machine"] == fingerprint.machine_id()
    assert list(path.parent.iterdir()) == [path]


def test_an_uncommitted_edit_of_measuring_code_shows_and_one_of_a_page_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(("git", *identity, *arguments), cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(fingerprint, "_ROOT", tmp_path)
    for house in ("dsv3", "bench", "ablations"):
        (tmp_path / house).mkdir()
        (tmp_path / house / "code.py").write_text("x = 1\n")
    for name in ("pyproject.toml", "constraints.txt", "README.md"):
        (tmp_path / name).write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    clean = fingerprint.revision()
    assert len(clean) == 12
    (tmp_path / "README.md").write_text("a page\n")
    assert fingerprint.revision() == clean
    (tmp_path / "bench" / "code.py").write_text("x = 2\n")
    edited = fingerprint.revision()
    assert edited.startswith(clean + "+")
    (tmp_path / "dsv3" / "more.py").write_text("y = 1\n")
    assert fingerprint.revision() not in (clean, edited)


def test_outside_a_repository_the_revision_is_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert fingerprint.revision().startswith("dsv3-")
