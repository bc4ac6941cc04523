"""Run the cells of a study on a Ray cluster: each is a task that starts the same fresh process as a local run.

Ray places the tasks; there is no scheduler of ours. A cell that measures time takes all cores of its node, so that no
neighbour stands in it; any other takes one (on a GPU, one GPU). The task measures into a folder of its own and hands
the records back, and only this process writes, so nodes need no common disk; they do need this code at the same place.

A node gives a cell another name (`cache.cell_key`) exactly if it holds other code or, of a cell that measures times, is
another machine. Its figures could not be compared with ours, so they are refused by name. RAY_ADDRESS says which
cluster; without it Ray starts one on this machine.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ablations import catalogue
from ablations.cache import cell_key, mark, marks
from ablations.cell import order
from ablations.code import ROOT, experts_reached
from ablations.run import in_fresh_process, label, patience, settle
from ablations.study import Cell, Study
from bench.fingerprint import cores, save
from bench.record import Profile, append, load
from dsv3.config.rules import require

_LOST = -9  # the status of a task that Ray lost: as of a process that was killed


@dataclass(frozen=True, kw_only=True)
class There:
    """What came of a cell on its node: the exit status of its process, what it printed, and, where it wrote any
    records, the cell's name there and the text of the files, that of the machine's fingerprint apart.
    """

    status: int
    said: str
    key: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    fingerprint: Mapping[str, str] = field(default_factory=dict)


def run_on_ray(
    name: str, study: Study, cells: tuple[Cell, ...], profile: Profile, out: Path, on_cell: Callable[[Cell], None]
) -> Iterator[str]:
    """Run the cells; yields, one by one as they end, what went wrong with each ("" for nothing).

    Args:
        on_cell: called with each cell as its task is handed to Ray.
        name: the study as `catalogue.load` knows it on every node.

    Raises:
        ValueError: Ray is not installed, or no node of the cluster is large enough for a cell.
    """
    ray = _ray()
    if not cells:
        return
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    ray.init(log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": {"PYTHONPATH": path}})
    try:
        _require_nodes(ray.nodes(), cells)
        tasks: dict[Any, Cell] = {}
        for cell in cells:
            remote = ray.remote(**_resources(cell), max_retries=0)(measured_there)
            tasks[remote.remote(order(name, cell, profile, Path()), patience(cell))] = cell
            on_cell(cell)
        while tasks:
            (done,), _ = ray.wait(list(tasks), num_returns=1)
            cell = tasks.pop(done)
            try:
                there = ray.get(done)
            except ray.exceptions.RayError as error:
                there = There(status=_LOST, said=f"Ray lost the task: {str(error).splitlines()[0]}")
            status, said = there.status, _keep(study, cell, profile, out, there) or there.said
            yield settle(study, cell, profile, out, status, said) or (f"{label(cell)}: {said}" if said else "")
    finally:
        ray.shutdown()  # of the tasks that are left too; a cell's process ends with the one that started it


def measured_there(text: str, limit: float) -> There:
    """On a node: run the cell in the order `text` into a folder of its own."""
    with TemporaryDirectory() as folder:
        told = json.loads(text) | {"out": folder}
        status, said = in_fresh_process(json.dumps(told), limit, threading.Event())
        files = {path.name: path.read_text() for path in Path(folder).glob("*.jsonl")}
        study = catalogue.load(told["study"])
        machine = save(folder, experts=experts_reached(study.measure)) if files else None
        fingerprint = {machine.name: machine.read_text()} if machine else {}
    key = cell_key(study, Cell(**told["cell"]), told["profile"]) if files else ""
    return There(status=status, said=said, key=key, files=files, fingerprint=fingerprint)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ValueError("on='ray': Ray is not installed; get it with: pip install \"dsv3[ray]\"") from error
    return ray


def _resources(cell: Cell) -> dict[str, int]:
    if cell.device != "cpu":
        return {"num_cpus": 1, "num_gpus": 1}
    return {"num_cpus": cores() if cell.timed else 1}


def _require_nodes(nodes: Sequence[Mapping[str, Any]], cells: Sequence[Cell]) -> None:
    """Without this Ray would wait for such a node for ever."""
    for cell in cells:
        wanted = {name[4:].rstrip("s").upper(): count for name, count in _resources(cell).items()}
        fits = any(all(node["Resources"].get(kind, 0) >= n for kind, n in wanted.items()) for node in nodes)
        require(fits, "on", "ray", f"must have a node with {wanted} for {label(cell)}", "add one, or run on local")


def _keep(study: Study, cell: Cell, profile: Profile, out: Path, there: There) -> str:
    """Append what came back, also of a reading that failed, and mark the cell where the node did; says why not, where
    the node has another name for it.
    """
    if not there.files:
        return ""
    key = cell_key(study, cell, profile)
    if there.key != key:
        return "refused: its node has other code, or is another machine than this one"
    with TemporaryDirectory() as folder:
        for name, text in there.files.items():
            Path(folder, name).write_text(text)
        records, finished = load(Path(folder, "records.jsonl")).records, marks(Path(folder))
    (out / "machines").mkdir(parents=True, exist_ok=True)
    for name, text in there.fingerprint.items():
        path = out / "machines" / name
        if not path.exists():
            path.with_suffix(".tmp").write_text(text)
            path.with_suffix(".tmp").replace(path)
    append(out / "records.jsonl", records)
    for done in finished:
        mark(out, key, records, done.seconds)
    return ""
