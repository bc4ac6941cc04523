"""Exact figures of small pieces of work: a training step, a prompt, a token, two processes, plans, drops.

    operators               torch operators that ran, by name; those of experts say which dispatch was taken
    host_synchronisations   those among them that make the host wait for a value of the device
    allocations, peak_bytes, live_bytes, flops, parameters     as in the glossary
    saved_bytes             what the first microbatch keeps for backward, measured where the step itself goes backward
    checkpoint_bytes        of each file that a checkpoint writes after three steps
    collectives             calls and bytes that one of two processes hands to its neighbour, by operator
    graphs, kernels, ...    what torch.compile makes of forward and backward (`bench.compiled`)

Weights, tokens and scores are generated from seeds: trained ones and text differ between machines, and ties with them.
One thread, and a call of each before, so that what happens once only is not counted; garbage collection waits from then
on.
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, distributed, multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.compiled import loss_of_rows, measure_compiled
from bench.meters.flops import flops
from bench.meters.memory import peak_bytes
from bench.meters.paired import threads
from bench.meters.saved import saved_bytes
from bench.variants import PHASES, SERVED, base, drawn_tokens, serving, training_step, variant, variants
from dsv3.config import Config, MoE
from dsv3.moe import expert_capacity
from dsv3.moe.capacity import place_in_queue
from dsv3.parallel import Ranks
from dsv3.pipeline import SCHEDULES, Times, bubble, simulate
from dsv3.resilience import save
from dsv3.train.state import TrainState
from dsv3.train.step import train_step

Figures = dict[str, Any]
State = TypeVar("State")

# The same wait has another name where autograd, which takes operators apart, is off: in inference mode.
WAITS = (
    *("aten._local_scalar_dense.default", "aten.item.default", "aten.is_nonzero.default"),
    "aten.nonzero.default",
)
PIPELINE_RANKS, MICROBATCHES = 4, 8
WORLD = 2
COMPILED = ("base", "window")  # one graph, and a selection that stays outside of graphs
ROUTED_TOKENS = 256
FACTORS = (1.0, 1.2, 1.5, 2.0)


def measure() -> dict[str, Figures]:
    """Every figure that the gate holds, by case."""
    steps = {name: measure_step(config) for name, config in variants().items()}
    served = {
        f"{phase}_{name}": measure_serving(variant(name), decode=phase == "decode")
        for name in SERVED
        for phase in PHASES
    }
    compiled = {f"compiled_{name}": measure_compiled(*loss_of_rows(variant(name))) for name in COMPILED}
    return steps | served | compiled | measure_plans() | measure_drops() | measure_two_processes()


def measure_step(config: Config) -> Figures:
    """A training step of this config, after the first."""
    step = training_step(config)
    found, built = work(step.build, step.call)
    state: TrainState = built[0]
    sizes = {
        "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "checkpoint_bytes": checkpoint_bytes(state),
    }
    with threads(1), uncollected():
        saved = saved_bytes(lambda: first_loss(step.call, built), state.model.parameters())
    return found | sizes | {"saved_bytes": saved.value}


def first_loss(call: Callable[[State], object], state: State) -> Tensor:
    """What a training step goes backward from first, with all that waits for backward; there the step ends."""

    def end(loss: Tensor) -> None:
        raise _BackwardError(loss)

    try:
        with mock.patch.object(Tensor, "backward", end):
            call(state)
    except _BackwardError as reached:
        return reached.loss
    raise AssertionError("a training step goes backward")


class _BackwardError(Exception):
    def __init__(self, loss: Tensor) -> None:
        super().__init__()
        self.loss = loss


def checkpoint_bytes(state: TrainState) -> dict[str, int]:
    """Bytes of each file of the state's checkpoint."""
    with TemporaryDirectory() as folder:
        written = save(folder, state.step, state.state_dict(), keep=1)
        return {path.name: path.stat().st_size for path in sorted(written.iterdir())}


def measure_serving(config: Config, *, decode: bool) -> Figures:
    """Reading a prompt into an empty cache, or one token after it."""
    served = serving(config, decode=decode)
    return work(served.build, served.call)[0]


def work(build: Callable[[], State], call: Callable[[State], object]) -> tuple[Figures, State]:
    """What `call(state)` costs once it has run before, and the state after three calls; `build` makes it, twice."""
    with threads(1):
        peak = peak_bytes(build, call)
        state = build()
        with uncollected():
            call(state)
            operations = flops(lambda: call(state))
            with Operators() as ran:
                call(state)
    found: Figures = {figure.metric: figure.value for figure in (*peak, operations)}
    found["operators"] = dict(sorted(ran.counts.items()))
    found["host_synchronisations"] = sum(ran.counts[name] for name in WAITS)
    return found, state


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is collected inside: when it is depends on what ran before, and what it ends may run operators."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def measure_plans() -> dict[str, Figures]:
    """Idle slots of each pipeline schedule at four ranks and eight microbatches, a forward taking one slot."""
    found = {}
    for schedule in SCHEDULES:
        idle = bubble(simulate(schedule.plan(PIPELINE_RANKS, MICROBATCHES), Times())).idle
        found[f"plan_{schedule.name}"] = {"bubble_slots": sum(idle)}
    return found


def measure_drops() -> dict[str, Figures]:
    """Assignments that find no place, by capacity factor, when every expert is chosen with its own probability."""
    moe = base().model.moe
    assert isinstance(moe, MoE), "the base has experts"
    indices = drawn_routing(moe)
    place = place_in_queue(indices, None)
    return {"drops": {f"{c:g}": int((place >= expert_capacity(len(indices), moe, c)).sum()) for c in FACTORS}}


def drawn_routing(moe: MoE) -> Tensor:
    """Experts [N, K] of generated tokens, expert i wanted in proportion to i + 1."""
    wanted = torch.arange(1.0, moe.n_routed_experts + 1).expand(ROUTED_TOKENS, -1)
    return torch.multinomial(wanted, moe.num_experts_per_tok, generator=torch.Generator().manual_seed(0))


def measure_two_processes() -> dict[str, Figures]:
    """What the first of two data-parallel processes sends in a training step."""
    answer = multiprocessing.get_context("spawn").SimpleQueue()
    with TemporaryDirectory() as folder:
        multiprocessing.spawn(_one_of_two, (f"file://{folder}/meeting", answer), nprocs=WORLD)
    return {"two_processes": {"collectives": answer.get()}}


def _one_of_two(rank: int, meeting: str, answer: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD)
    ranks = Ranks(rank=rank, world=WORLD, group=distributed.group.WORLD)
    state, rows = TrainState.create(base(), seed=0), drawn_tokens()
    with uncollected():
        train_step(state, rows, ranks=ranks)
        with Operators() as ran:
            train_step(state, rows, ranks=ranks)
    if ranks.first:
        answer.put(collectives(ran))
    distributed.destroy_process_group()


def collectives(ran: "Operators") -> Figures:
    """Calls and bytes of each operator of torch.distributed."""
    return {name: {"calls": ran.counts[name], "bytes": sent} for name, sent in sorted(ran.sent.items())}


class Operators(TorchDispatchMode):
    """Counts the operators that run inside, by name, and the bytes that those of torch.distributed are given."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and go on."""
        self.counts[str(func)] += 1
        if func.namespace == "c10d":
            self.sent[str(func)] += sum(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))
