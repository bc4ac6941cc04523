"""The config room: every choice of a run as a frozen value, checked when it is made, without torch.

A choice with variants is a union of dataclasses (`Latent | Grouped | MultiHead`), dispatched by one `match` in the room
that builds it. A run is a function in `presets` that returns a whole `Config`; an arm of a study is a `vary` of it.
"""

from dsv3.config.attention import (
    Attention,
    Auto,
    Blocks,
    Everything,
    Grouped,
    Hierarchical,
    Indexer,
    Latent,
    MultiHead,
    PerHead,
    Select,
    Window,
)
from dsv3.config.change import vary
from dsv3.config.layers import Rope, Yarn
from dsv3.config.model import MTP, Model
from dsv3.config.moe import (
    Adaptive,
    Balance,
    Bias,
    Capacity,
    CentredSignBias,
    Dropless,
    ExpertChoice,
    Fixed,
    MoE,
    ProportionalBias,
    QuadraticLoss,
    QuantileBias,
    SequenceLoss,
    SignBias,
    SimilarityLoss,
    SwitchLoss,
    ZLoss,
)
from dsv3.config.precision import BFloat16, Float8Block, Float16, Float32, Precision
from dsv3.config.store import digest, from_json, to_json
from dsv3.config.train import SGD, AdamW, Data, Optimizer, Schedule, Train
from dsv3.config.whole import Config

__all__ = [
    "ZLoss",
    "QuantileBias",
    "ProportionalBias",
    "Bias",
    "MTP",
    "SGD",
    "AdamW",
    "Adaptive",
    "Attention",
    "Auto",
    "BFloat16",
    "Balance",
    "Blocks",
    "Capacity",
    "CentredSignBias",
    "Config",
    "Data",
    "Dropless",
    "Everything",
    "ExpertChoice",
    "Fixed",
    "Float8Block",
    "Float16",
    "Float32",
    "Grouped",
    "Hierarchical",
    "Indexer",
    "Latent",
    "MoE",
    "Model",
    "MultiHead",
    "Optimizer",
    "PerHead",
    "Precision",
    "QuadraticLoss",
    "Rope",
    "SignBias",
    "Schedule",
    "Select",
    "SequenceLoss",
    "SimilarityLoss",
    "SwitchLoss",
    "Train",
    "Window",
    "Yarn",
    "digest",
    "from_json",
    "to_json",
    "vary",
]
