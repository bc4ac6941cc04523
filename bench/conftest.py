"""pytest plugin of the benchmark cases: the options of `python -m bench`, and the fixtures that a case asks for.

measure_arms  check, time and keep the arms of a case (`bench.cases.measure_arms` without its first arguments)
keep          keep(arm, measurements, axes=...): records of figures that the case measured itself
run           the command line's choices; device and profile are its parts that cases need most
"""

import gc
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cases
from bench.cases import Figures, Run
from bench.fingerprint import fingerprint, provenance, revision
from bench.measurement import Measurement, Point
from bench.record import Profile
from dsv3.moe.dispatch import chosen_here


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options that `python -m bench` passes on."""
    group = parser.getgroup("dsv3", "dsv3 benchmark cases")
    group.addoption("--bench-profile", choices=("quick", "full"), default="quick", help="how long to measure")
    group.addoption("--bench-device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    group.addoption("--bench-out", type=Path, default=Path("reports/out"), help="folder of records.jsonl")


def pytest_collection_finish() -> None:
    """What is imported stays: going through it would take each `gc.collect()` of the meters a tenth of a second."""
    gc.collect()
    gc.freeze()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """pytest-benchmark's JSON carries our fingerprint too."""
    machine_info["dsv3"] = fingerprint(experts=chosen_here())


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """The revision as our records name it."""
    commit_info["dsv3"] = revision()


@pytest.fixture(scope="session")
def run(pytestconfig: pytest.Config) -> Run:
    """What the command line chose."""
    chosen = pytestconfig.getoption
    return Run(
        out=chosen("--bench-out"),
        device=chosen("--bench-device"),
        provenance=provenance(chosen("--bench-profile")),
    )


@pytest.fixture(scope="session")
def device(run: Run) -> torch.device:
    """Where the case's tensors live."""
    return torch.device(run.device)


@pytest.fixture(scope="session")
def profile(run: Run) -> Profile:
    """quick or full: quick takes small sizes."""
    return run.profile


@pytest.fixture
def measure_arms(run: Run, benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., Figures]:
    """`bench.cases.measure_arms` for this case; the study is the file's name."""
    return partial(cases.measure_arms, run, benchmark, study=_study(request))


@pytest.fixture
def keep(run: Run, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Keep figures that the case measured itself, as records of an arm of this file's study."""

    def keep_figures(
        arm: str,
        measurements: Iterable[Measurement],
        *,
        baseline: str | None = None,
        seed: int | None = None,
        config: str | None = None,
        axes: Mapping[str, str | int | float] | None = None,
    ) -> None:
        where = dict(axes or {}) | {"device": run.device}
        point = Point(study=_study(request), arm=arm, baseline=baseline, seed=seed, config=config, axes=where)
        run.keep(point, measurements)

    return keep_figures


def _study(request: pytest.FixtureRequest) -> str:
    return str(request.module.__name__).rpartition(".")[2]
