"""What a run moves from step to step, and what its checkpoint therefore holds.

While an indexer warms up it alone learns. The other weights are frozen and come from a run that attended densely, which
has the same names: `state.model.load_state_dict(weights, strict=False)`; so does the sparse stage that follows.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from dsv3.attention.select import LightningIndexer
from dsv3.config import Config, Indexer
from dsv3.model import Transformer
from dsv3.moe import MoELayer
from dsv3.precision import LossScale, apply, initial
from dsv3.train import optimizer as optimizers


@dataclass(kw_only=True)
class TrainState:
    """A model and its optimizer after `step` steps. `loss_scale` is None where losses are not scaled."""

    config: Config
    model: Transformer
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale | None
    step: int = 0

    @classmethod
    def create(cls, config: Config, *, seed: int, device: torch.device | str = "cpu") -> "TrainState":
        """The state before the first step; initial weights depend on the seed alone."""
        model = Transformer(config.model, seed=seed).to(device)
        apply(model, config.train.precision)
        select = config.model.attention.select
        if isinstance(select, Indexer) and select.stage == "warmup":
            model.requires_grad_(False)
            for indexer in indexers(model):
                indexer.requires_grad_(True)
        optimizer = optimizers.build(model, config.train.optimizer)
        return cls(config=config, model=model, optimizer=optimizer, loss_scale=initial(config.train.precision))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def expert_layers(self) -> list[MoELayer]:
        """The layers with experts, in the order of `ModelOutput.routing`."""
        return [module for module in self.model.modules() if isinstance(module, MoELayer)]

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, but for the position in the data."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": {"step": self.step, "loss_scale": None if self.loss_scale is None else asdict(self.loss_scale)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["progress"]["step"]
        scale = state["progress"]["loss_scale"]
        self.loss_scale = None if scale is None else LossScale(**scale)


def indexers(model: Transformer) -> list[LightningIndexer]:
    """The indexers of all layers."""
    return [module for module in model.modules() if isinstance(module, LightningIndexer)]
