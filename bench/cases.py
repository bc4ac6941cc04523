"""What a benchmark case does with its arms: check parity, then time alternated blocks, then keep the records.

A case is a function `bench_<what>` in `bench/bench_<room>.py` that asks pytest for `measure_arms`. It hands over
callables that are ready to run, and a check that raises where an arm does not compute what its reference does. No
figure without the check: where it fails, every figure asked for becomes an error record and the case fails.

On a CPU the blocks run at one thread, where CPU time decides, and then at all cores for wall time. On a GPU wall time
around a synchronisation is the only clock. One round of pytest-benchmark is one block, so its JSON holds the time of
whole blocks and, in extra_info, our figures.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.fingerprint import Provenance, cores
from bench.measurement import Measurement, Point, failure, record
from bench.meters.ceiling import gemm_rate
from bench.meters.energy import Absent, energy
from bench.meters.paired import Block, Clock, cuda_clock, plan, process_clock, summary, threads, time_block
from bench.record import Profile, append
from bench.speed import model_flops_utilisation, rate

BLOCKS: Mapping[Profile, int] = {"quick": 6, "full": 15}
SECONDS: Mapping[Profile, float] = {"quick": 1.0, "full": 5.0}  # of blocks, where they are short

Arms = Mapping[str, Callable[[], object]]
Figures = dict[str, dict[str, Measurement]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the command line chose: where records go, how long to measure, on which device."""

    out: Path
    device: str
    provenance: Provenance

    @property
    def profile(self) -> Profile:
        """quick or full."""
        return self.provenance.profile

    def keep(self, point: Point, measurements: Iterable[Measurement]) -> None:
        """Append figures that a case measured itself, such as peak bytes.

        Raises:
            ValueError: a figure that is no finite number; its error and the other figures are kept.
        """
        records = [record(point, self.provenance, measurement) for measurement in measurements]
        append(self.out / "records.jsonl", records)
        if lost := [row.error for row in records if row.error is not None]:
            raise ValueError(f"{point.arm}: {'; '.join(lost)}")

    def keep_failures(self, point: Point, names: Iterable[str], error: str) -> None:
        """Append an error record for each metric that could not be had."""
        append(self.out / "records.jsonl", [failure(point, self.provenance, name, error) for name in names])


@dataclass(frozen=True, kw_only=True)
class Session:
    """One stretch of blocks: how many threads, which clock to read and which of its hands decide."""

    threads: int | None
    clock: Clock
    hands: tuple[str, ...]


def sessions(device: str) -> tuple[Session, ...]:
    """CPU time at one thread and then wall time at all cores; wall time alone on a GPU."""
    if device != "cpu":
        return (Session(threads=None, clock=cuda_clock, hands=("wall",)),)
    one = Session(threads=1, clock=process_clock, hands=("cpu",))
    return one, Session(threads=cores(), clock=process_clock, hands=("wall",))


def measure_arms(
    run: Run,
    benchmark: Any,
    *,
    study: str,
    phase: str,
    arms: Arms,
    baseline: str,
    check: Callable[[], None],
    axes: Mapping[str, str | int | float] | None = None,
    seed: int | None = None,
    config: str | None = None,
    blocks: int | None = None,
    tokens: int | None = None,
    flops: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Figures:
    """Check, time and keep the arms of one case; its figures by arm and metric.

    phase     "forward", "forward_backward", "step" or "decode": names the ratios
    check     raises where an arm is not equal to its reference; runs before anything is timed
    axes      what else identifies the point, such as {"length": 4096}; device, phase and threads are added
    tokens    tokens of one call of every arm: adds tokens_per_second, and energy_per_token of a step on a GPU
    flops     operations of one call of every arm, in `dtype`: adds ceiling_share, and mfu on a GPU

    Raises:
        Exception: what the check or an arm raised, after it was written as error records.
    """
    where = dict(axes or {}) | {"device": run.device, "phase": phase}
    point = Point(study=study, arm=baseline, baseline=baseline, seed=seed, config=config, axes=where)
    try:
        check()
        timed = _time(run, benchmark, arms, blocks)
    except Exception as error:
        _keep_error(run, point, arms, phase, f"{type(error).__name__}: {error}")
        raise
    figures: Figures = {arm: {} for arm in arms}
    for session, taken in timed:
        with_threads = where if session.threads is None else where | {"threads": session.threads}
        ceiling = None if flops is None else _ceiling(run, session, dtype)
        for arm in arms:
            found = summary(taken, arm, baseline, phase, session.hands)
            here = replace(point, arm=arm, axes=with_threads)
            found += _speeds(run, here, session, found[0], tokens, flops, ceiling, dtype)
            if run.device == "cuda" and phase == "step" and tokens is not None:
                found += _energy(run, here, arms[arm], tokens)
            run.keep(here, found)
            figures[arm] |= {measurement.metric: measurement for measurement in found}
    benchmark.group = study
    benchmark.extra_info |= {"axes": where, "figures": {arm: _plain(found) for arm, found in figures.items()}}
    return figures


def _ceiling(run: Run, session: Session, dtype: torch.dtype) -> float:
    with threads(session.threads):
        return gemm_rate(torch.device(run.device), dtype, which=session.hands[0]).value


def _speeds(
    run: Run,
    point: Point,
    session: Session,
    seconds: Measurement,
    tokens: int | None,
    flops: float | None,
    ceiling: float | None,
    dtype: torch.dtype,
) -> tuple[Measurement, ...]:
    found: tuple[Measurement, ...] = ()
    if "wall" in session.hands and tokens is not None:
        found += (rate(seconds, "tokens_per_second", tokens),)
    if flops is not None and ceiling is not None:
        found += (rate(seconds, "ceiling_share", flops / ceiling),)
        if run.device == "cuda":
            share = model_flops_utilisation(seconds, flops, dtype)
            if isinstance(share, str):
                run.keep_failures(point, ["mfu"], share)
            else:
                found += (share,)
    return found


def _energy(run: Run, point: Point, arm: Callable[[], object], tokens: int) -> tuple[Measurement, ...]:
    def call() -> None:
        arm()
        torch.cuda.synchronize()

    found = energy(call, tokens=tokens, index=torch.cuda.current_device())
    if isinstance(found, Absent):
        run.keep_failures(point, ["energy_per_token"], f"pending: {found.reason}")
        return ()
    return found


def _time(run: Run, benchmark: Any, arms: Arms, blocks: int | None) -> list[tuple[Session, list[Block]]]:
    # pytest-benchmark takes one measurement per case: the blocks that decide, which come first.
    first, *others = sessions(run.device)
    timed = [(first, _blocks(run, first, arms, blocks, partial(_rounds, benchmark)))]
    return timed + [(session, _blocks(run, session, arms, blocks, _repeat)) for session in others]


def _blocks(
    run: Run, session: Session, arms: Arms, blocks: int | None, repeat: Callable[[Callable[[], None], int], None]
) -> list[Block]:
    taken: list[Block] = []
    with threads(session.threads):
        least = blocks or BLOCKS[run.profile]
        chosen = plan(arms, least=least, seconds=0.0 if blocks else SECONDS[run.profile], clock=session.clock)
        repeat(lambda: taken.append(time_block(arms, len(taken), chosen.calls, session.clock)), chosen.blocks)
    return taken


def _rounds(benchmark: Any, block: Callable[[], None], count: int) -> None:
    benchmark.pedantic(block, rounds=count)


def _repeat(block: Callable[[], None], count: int) -> None:
    for _ in range(count):
        block()


def _keep_error(run: Run, point: Point, arms: Arms, phase: str, error: str) -> None:
    hands = [hand for session in sessions(run.device) for hand in session.hands]
    for arm in arms:
        names = [f"{hand}_seconds" if arm == point.baseline else f"{phase}_{hand}_ratio" for hand in hands]
        run.keep_failures(replace(point, arm=arm), names, error)


def _plain(found: Mapping[str, Measurement]) -> dict[str, dict[str, Any]]:
    return {name: {"value": figure.value, "n": figure.n, "interval": figure.interval} for name, figure in found.items()}
