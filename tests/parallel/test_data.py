"""Two processes that share a batch are one: losses, gradients, biases and weights, batch-wide losses included."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3.config import Fixed, SequenceLoss
from dsv3.parallel import ALONE, Ranks, joined
from dsv3.resilience import load_latest
from tests.parallel import trajectory
from tests.train import small

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
RELATIVE = 1e-6  # about ten roundings of fp32 (eps 6e-8)


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*TORCHRUN, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes did, for each number of microbatches."""
    out = tmp_path_factory.mktemp("ranks") / "two.pt"
    done = torchrun("tests/parallel/trajectory.py", str(out))
    assert done.returncode == 0, done.stderr
    loaded: list[dict[str, Any]] = torch.load(out, weights_only=True)
    return loaded


@pytest.fixture(scope="module", params=trajectory.MICROBATCHES, ids=["whole batch", "two microbatches"])
def both(request: pytest.FixtureRequest, shared: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The trajectory of one process and that of two."""
    place = trajectory.MICROBATCHES.index(request.param)
    return trajectory.trajectory(accumulation_steps=request.param), shared[place]


def test_no_router_is_near_a_tie(both: tuple[dict[str, Any], ...]) -> None:
    assert min(result["margin"] for result in both) > 1e-4


def test_two_processes_have_the_losses_of_one(both: tuple[dict[str, Any], ...]) -> None:
    one, two = both
    assert set(one["losses"][0]) >= {"main", "mtp", "balance_sequence", "balance_switch", "balance_quadratic", "total"}
    for alone, together in zip(map(dict, one["losses"]), map(dict, two["losses"]), strict=True):
        # the quadratic loss is made of differences p - 1/E of near equals, in which a digit is lost
        quadratic = alone.pop("balance_quadratic")
        assert together.pop("balance_quadratic") == pytest.approx(quadratic, rel=10 * RELATIVE)
        assert together == pytest.approx(alone, rel=RELATIVE)


def test_two_processes_have_the_gradient_of_one(both: tuple[dict[str, Any], ...]) -> None:
    one, two = both
    assert one["gradient"].keys() == two["gradient"].keys()
    assert small.relative_distance(small.flat(one["gradient"]), small.flat(two["gradient"])) < RELATIVE
    for name, gradient in one["gradient"].items():
        assert small.relative_distance(gradient, two["gradient"][name]) < 10 * RELATIVE, name


def test_two_processes_have_the_weights_of_one_after_ten_steps(both: tuple[dict[str, Any], ...]) -> None:
    one, two = both
    assert small.relative_distance(small.flat(one["weights"]), small.flat(two["weights"])) < RELATIVE


def test_two_processes_move_the_biases_by_the_loads_of_the_whole_batch(both: tuple[dict[str, Any], ...]) -> None:
    one, two = both
    biases = [name for name in one["weights"] if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    assert all(torch.equal(one["weights"][name], two["weights"][name]) for name in biases)
    assert one["max_vio"] == two["max_vio"]


@pytest.mark.slow
def test_torchrun_trains_like_one_process_and_only_rank_0_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", small.cache(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = small.book(tmp_path)
    fields = f"--data {data.paths[0]} --steps 4 --data.validation 0.2 --data.test 0.2 --model.vocab-size 300 "
    fields += "--model.hidden-size 16 --train.batch-size 4 --train.sequence-length 16 --train.eval-sequences 5 --quiet"
    arguments = ["-m", "dsv3.train", *fields.split(), "--out"]
    done = torchrun(*arguments, str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("log.jsonl") == 1
    subprocess.run([sys.executable, *arguments, str(tmp_path / "one")], cwd=ROOT, check=True)
    logs = [(tmp_path / run / "log.jsonl").read_text().splitlines() for run in ("one", "two")]
    for one, two in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert one["kind"] == two["kind"]
        if one["kind"] == "step":
            assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)  # AdamW magnifies rounding where v is small
        elif one["kind"] in ("validation", "test"):
            assert two["bits_per_byte"] == pytest.approx(one["bits_per_byte"], rel=1e-4)
    assert load_latest(tmp_path / "two" / "checkpoints")[0] == 4


def test_alone_sums_and_means_are_the_values_themselves() -> None:
    value = torch.tensor([1.0, 2.0], requires_grad=True)
    assert ALONE.sum(value) is value
    assert ALONE.mean(value) is value
    ALONE.wait()


def test_without_torchrun_a_process_is_alone() -> None:
    with joined({}, torch.device("cpu")) as ranks:
        assert ranks is ALONE
    assert Ranks().first


def test_contradicting_variables_are_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"RANK=2: must be in \[0, WORLD_SIZE=2\)"),
        joined({"WORLD_SIZE": "2", "RANK": "2"}, torch.device("cpu")),
    ):
        pass


def test_a_fixed_capacity_drops_by_process_and_so_differs_from_one_process() -> None:
    config = small.config((SequenceLoss(),), **{"model.moe.capacity": Fixed(factor=1.0)})
    (rows,) = small.rows(config)
    state = trajectory.TrainState.create(config, seed=0)

    def kept(part: torch.Tensor) -> int:
        routing = state.model(part[:, :-1]).routing[0]
        assert routing.kept is not None
        return int(routing.kept.sum())

    assert sum(map(kept, rows.chunk(2))) < kept(rows), "two short queues overflow more than one long one"
