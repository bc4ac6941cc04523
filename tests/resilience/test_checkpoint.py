"""A checkpoint is whole or absent: round trips, every way of being damaged, and a process killed while it writes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3.resilience import checkpoint

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
tensors = st.builds(
    lambda shape, dtype, seed: torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    dtypes,
    st.integers(0, 9),
)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
values = st.recursive(
    tensors | plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
states = st.dictionaries(st.sampled_from(["model", "optimizer", "batches"]), values, min_size=1)


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and first == second


def state_of(step: int) -> dict[str, Any]:
    return {"model": {"weight": torch.full((64,), float(step))}, "optimizer": {"step": step}}


def saved(directory: Path, *steps: int, keep: int = 9) -> list[Path]:
    return [checkpoint.save(directory, step, state_of(step), keep=keep) for step in steps]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(states)
def test_what_was_saved_is_what_is_loaded(tmp_path: Path, state: dict[str, Any]) -> None:
    checkpoint.save(tmp_path, 7, state, keep=1)
    step, loaded = checkpoint.load_latest(tmp_path)
    assert step == 7
    assert same(loaded, state)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, 10, keep=2)
    assert [found.step for found in checkpoint.found(tmp_path)] == [3, 10]


def test_some_parts_can_be_loaded_alone(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    assert checkpoint.load_latest(tmp_path, parts=("optimizer",)) == (1, {"optimizer": {"step": 1}})


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a truncated part": (
        lambda path: (path / "model.pt").write_bytes((path / "model.pt").read_bytes()[:-5]),
        r"model\.pt has \d+ of \d+ bytes",
    ),
    "a missing part": (lambda path: (path / "optimizer.pt").unlink(), r"optimizer\.pt is missing"),
    "a flipped byte": (
        lambda path: (path / "model.pt").write_bytes(flipped((path / "model.pt").read_bytes())),
        r"model\.pt does not have the SHA-256",
    ),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), r"manifest\.json is missing"),
    "a cut manifest": (lambda path: (path / "manifest.json").write_text('{"step": 2, "par'), "is not readable"),
    "a manifest of something else": (lambda path: (path / "manifest.json").write_text("[]"), "is not readable"),
    "a binary manifest": (lambda path: (path / "manifest.json").write_bytes(b"\xff\xff"), "is not readable"),
}


def flipped(content: bytes) -> bytes:
    return content[:100] + bytes([content[100] ^ 1]) + content[101:]


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    _, last = saved(tmp_path, 1, 2)
    damage(last)
    with pytest.warns(UserWarning, match=f"step-00000002 is refused: .*{message}.*step 1 is used instead"):
        step, state = checkpoint.load_latest(tmp_path)
    assert step == 1
    assert same(state, state_of(1))


@pytest.mark.parametrize("name", DAMAGES)
def test_without_a_whole_checkpoint_the_error_says_what_each_lacks(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(saved(tmp_path, 2)[0])
    with pytest.raises(ValueError, match=f"no whole checkpoint .*{message}"):
        checkpoint.load_latest(tmp_path)


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is none"):
        checkpoint.load_latest(tmp_path)


def test_a_damaged_checkpoint_is_replaced_by_saving_its_step_again(tmp_path: Path) -> None:
    path = saved(tmp_path, 1, 2)[1]
    (path / "model.pt").unlink()
    saved(tmp_path, 2)
    assert [(found.step, found.problem) for found in checkpoint.found(tmp_path)] == [(1, None), (2, None)]


def test_a_state_that_cannot_be_written_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Exception, match=r"pickle|lambda"):
        checkpoint.save(tmp_path, 2, {"model": {"a": 1}, "optimizer": lambda: None}, keep=1)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_written_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out='.*file/run': cannot be written"):
        checkpoint.require_writable(tmp_path / "file" / "run")
    assert checkpoint.require_writable(tmp_path / "new" / "run").is_dir()
    assert list((tmp_path / "new" / "run").iterdir()) == []


SAVE_FOR_EVER = """
import itertools, sys, torch
from dsv3.resilience import checkpoint
for step in itertools.count(1):
    checkpoint.save(sys.argv[1], step, {"model": torch.full((200_000,), float(step)), "optimizer": step}, keep=2)
    print(step, flush=True)
"""


@pytest.mark.parametrize("steps", [1, 3])
def test_a_process_killed_while_saving_leaves_a_whole_checkpoint(tmp_path: Path, steps: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    with process, process.stdout as lines:
        done = [int(next(lines)) for _ in range(steps)][-1]
        process.send_signal(signal.SIGKILL)
    step, state = checkpoint.load_latest(tmp_path)
    assert step >= done
    assert state["optimizer"] == step
    assert bool((state["model"] == step).all())
    assert all(found.problem is None for found in checkpoint.found(tmp_path))
    saved(tmp_path, step + 1)
    assert not [path.name for path in tmp_path.iterdir() if not path.name.startswith("step-")]


def test_the_manifest_names_each_part_with_its_size(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 5)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 5
    assert {name: part["bytes"] for name, part in manifest["parts"].items()} == {
        file.name: file.stat().st_size for file in path.glob("*.pt")
    }
