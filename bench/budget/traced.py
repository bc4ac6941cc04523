"""A training step of the real model on fake tensors: shapes and types without memory, so that 671 billion parameters
fit anywhere. Every layer is traced, on one device, forward, backward and update.

What is traced is `dsv3.model.Transformer` with the losses of `dsv3.train`, and the stand-ins of `stand_ins.py` for what
hangs on data. A selection of keys cannot be traced, since the sizes of its lists are data; the caller asks for the same
model without. Fake tensors are of the CPU, whose fused attention pads values to the width of keys.

Data parallelism is traced through `dsv3.parallel` on torch's fake process group: whole replicas whose gradients are
averaged. Seen are the bytes that are handed to the collective, and what its flat buffers add to the peak. ZeRO and all
other splits are arithmetic.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench.budget.activations import Policy
from bench.budget.counted import Counted, attention_formulas
from bench.budget.live import Live
from bench.budget.stand_ins import Answers, built, recompute
from bench.budget.states import Recipe
from dsv3.config import Config, Everything, vary
from dsv3.model import Transformer
from dsv3.model.block import Block
from dsv3.moe.balance import alone
from dsv3.parallel import ALONE, Ranks
from dsv3.train.loss import loss_parts

DTYPES = {2: torch.bfloat16, 4: torch.float32}


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a step took. Bytes; `peak` is the highest sum of live tensors but for the exchange of gradients, `at_peak`
    says of what kinds; `handed` are the bytes that one replica hands to the collective which averages gradients, and
    `replica_peak` is the highest sum with it.
    """

    parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    kept_bytes: int
    flops: int
    peak: int
    at_peak: Mapping[str, int]
    replica_peak: int
    handed: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """A model with its optimizer's state, and the batch; `masters` are fp32 copies of the weights, where kept."""

    config: Config
    model: Transformer
    optimizer: torch.optim.Optimizer | None
    masters: Sequence[nn.Parameter]
    moments: Sequence[Tensor]
    sequences: int

    @property
    def stepped(self) -> list[nn.Parameter]:
        """The parameters whose gradients the update reads."""
        return list(self.masters) if self.masters and self.masters[0].requires_grad else list(self.model.parameters())

    def states(self) -> list[Tensor]:
        """Everything that only the optimizer reads, its step counters apart."""
        held = (
            []
            if self.optimizer is None
            else [part for state in self.optimizer.state.values() for part in state.values()]
        )
        return [*(part for part in held if part.ndim > 0), *self.masters, *self.moments]

    def loss(self) -> Tensor:
        """The loss of the batch, with the graph behind it."""
        length = self.config.train.sequence_length
        rows = torch.zeros(self.sequences, length + 1, dtype=torch.int64)
        output = self.model(rows[:, :-1], mtp=self.config.train.mtp_loss_weight > 0)
        return loss_parts(output, rows, self.config, alone)["total"]

    def update(self) -> None:
        """The optimizer's step; a recipe with master weights has its states and needs nothing more to update."""
        if self.optimizer is not None:
            self.optimizer.step()

    def zeroed_gradients(self) -> list[Tensor]:
        """Give each parameter a gradient of zeros."""
        for parameter in self.stepped:
            parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.stepped if parameter.grad is not None]

    def forget(self) -> None:
        """Drop the gradients, as a training step does at its end."""
        for parameter in (*self.model.parameters(), *self.masters):
            parameter.grad = None


def traceable(config: Config) -> Config:
    """The config without a selection of keys."""
    return (
        config
        if isinstance(config.model.attention.select, Everything)
        else vary(config, **{"model.attention.select": Everything()})
    )


def trace(
    config: Config,
    recipe: Recipe,
    *,
    sequences: int = 1,
    policy: Policy = "none",
    replicas: int = 1,
    accumulating: bool = False,
) -> Trace:
    """Trace a training step of `sequences` rows of the config's length, as one of `replicas` data-parallel processes.

    `accumulating`: the gradients of an earlier microbatch are there already, as they are in all microbatches but the
    first.

    Raises:
        ValueError: for a model that selects keys; trace `traceable(config)`.
    """
    if not isinstance(config.model.attention.select, Everything):
        raise ValueError(
            f"select={config.model.attention.select!r}: the sizes of its lists are data, which a trace has not; "
            "trace the model with Everything()"
        )
    with replicated(replicas) as ranks, faked() as live:
        step = build(config, recipe, sequences=sequences, policy=policy)
        live.own(step.model.parameters(), "parameters")
        live.own(step.states(), "optimizer")
        live.gradients_of(zip(step.model.parameters(), step.stepped, strict=True))
        if accumulating:
            live.own(step.zeroed_gradients(), "gradients")
        before = live.now
        live.restart()
        with Counted(attention_formulas(config.model)) as counted:
            loss = step.loss()
            kept = live.now - before
            loss.backward()
            gradients = sum(owner.grad.nbytes for owner in step.stepped if owner.grad is not None)
            before_exchange = live.peak, live.at_peak
            ranks.average_gradients(step.stepped)
            exchanging, (live.peak, live.at_peak) = live.peak, before_exchange
        step.update()
    return Trace(
        parameters=sum(parameter.numel() for parameter in step.model.parameters()),
        parameter_bytes=sum(parameter.nbytes for parameter in step.model.parameters()),
        gradient_bytes=gradients,
        optimizer_bytes=sum(state.nbytes for state in step.states()),
        kept_bytes=kept,
        flops=counted.flops,
        peak=live.peak,
        at_peak=live.at_peak,
        replica_peak=max(exchanging, live.peak),
        handed=counted.handed,
    )


@contextmanager
def replicated(world: int) -> Iterator[Ranks]:
    """The first of `world` processes, on torch's fake process group; the others do not exist."""
    if world == 1:
        yield ALONE
        return
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield Ranks(rank=0, world=world, group=distributed.group.WORLD)
    finally:
        distributed.destroy_process_group()


@contextmanager
def faked() -> Iterator[Live]:
    """Inside, tensors are fake, the host's questions are answered, and storages are followed."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(Answers())
        yield stack.enter_context(Live())


def build(config: Config, recipe: Recipe, *, sequences: int, policy: Policy) -> Step:
    """The model in the recipe's weights, with static experts, recomputation and optimizer state, before a step."""
    model = built(config.model, DTYPES[recipe.weight])
    if policy != "none":
        for module in list(model.modules()):
            if isinstance(module, Block):
                recompute(module, policy)
    parameters = list(model.parameters())
    optimizer, masters, moments = None, list[nn.Parameter](), list[Tensor]()
    if recipe.master:
        own_gradients = recipe.gradient != recipe.weight
        masters = [nn.Parameter(parameter.detach().float(), requires_grad=own_gradients) for parameter in parameters]
        kinds = [DTYPES[size] for size in recipe.moments]
        moments = [torch.zeros_like(master, dtype=kind) for master in masters for kind in kinds]
        if own_gradients:
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.register_post_accumulate_grad_hook(partial(_hand_over, master))
    elif recipe.moments:
        optimizer = torch.optim.AdamW(parameters, fused=True)
        for parameter in parameters:  # the first update makes the moments
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return Step(config=config, model=model, optimizer=optimizer, masters=masters, moments=moments, sequences=sequences)


def _hand_over(master: nn.Parameter, parameter: nn.Parameter) -> None:
    assert parameter.grad is not None, "called when the gradient is there"
    if master.grad is None:
        master.grad = parameter.grad.float()
    else:
        master.grad.add_(parameter.grad)
    parameter.grad = None
