"""Data parallelism: every process has the whole model and an equal piece of each batch, and all take the same step.

    gradient     mean over processes of the gradient of the local mean loss
                 = gradient of the mean loss of the global batch
    statistic    a loss that is not a mean over tokens, such as alpha sum_i (p_i - 1/E)^2 with p the mean over the
                 batch, needs the global p. It is used with the value of the mean over processes and the gradient of
                 the local statistic. Averaging the gradients then gives sum_i 2 (p_i - 1/E) mean_r dp_ir, which is
                 the gradient of the global loss
    counts       summed

Gradients are summed in one flat buffer after the last microbatch. That overlaps nothing with the backward pass, which
is right for gloo on one machine and for parity; `torch.nn.parallel.DistributedDataParallel` would hide the time on a
network. Processes start from equal weights because initial weights depend on the seed alone. The model knows nothing of
all this.
"""

import datetime
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from dsv3.config.rules import require

TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; `group` is None when it is alone."""

    rank: int = 0
    world: int = 1
    group: distributed.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    @torch.no_grad()
    def sum(self, local: Tensor) -> Tensor:
        """The sum over processes, the same on each; `local` is left as it was."""
        if self.group is None:
            return local
        total = local.detach().clone()
        distributed.all_reduce(total, group=self.group)
        return total

    def mean(self, statistic: Tensor) -> Tensor:
        """The mean over processes in value, with the gradient of the local statistic."""
        if self.group is None:
            return statistic
        return statistic + (self.sum(statistic) / self.world - statistic.detach())

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace each gradient by its mean over processes, in place; a parameter without one counts as zero."""
        if self.group is None:
            return
        owners = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in owners:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in owners if parameter.grad is not None]
        flat = self.sum(torch.cat([gradient.flatten() for gradient in gradients])).div_(self.world)
        for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.group is not None:
            distributed.barrier(self.group)


ALONE = Ranks()


@contextmanager
def joined(environment: Mapping[str, str], device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun started, as its variables in `environment` say; alone without them.

    Raises:
        ValueError: variables that contradict each other.
    """
    world = int(environment.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE
        return
    rank = int(environment.get("RANK", "-1"))
    require(0 <= rank < world, "RANK", rank, f"must be in [0, WORLD_SIZE={world})", "start with torchrun")
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, rank=rank, world_size=world, timeout=TIMEOUT)
    try:
        yield Ranks(rank=rank, world=world, group=distributed.group.WORLD)
    finally:
        distributed.destroy_process_group()
