"""How a model is trained: steps, batch, optimizer, schedule, precision.

Defaults follow DeepSeek-V3 (arXiv 2412.19437 section 4.2) where a small run allows it: AdamW 0.9/0.95 with decay 0.1,
clip 1.0, linear warm-up, a constant phase, a cosine to a tenth of the peak, multi-token loss weight 0.3.
"""

from dataclasses import dataclass, field

from dsv3.config.precision import BFloat16, Float8Block, Float16, Float32, Precision
from dsv3.config.rules import require, require_kind, require_number, require_positive


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW; matrices decay, norms and biases do not."""

    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            require_number(self, name, low=0.0, above=True)
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, name, value, "must be in [0, 1)", "0.9 and 0.95 are usual")
        require_number(self, "weight_decay", low=0.0)


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Plain gradient descent: the update is linear in the gradient, which parity tests across process counts need."""

    lr: float = 0.1

    def __post_init__(self) -> None:
        require_number(self, "lr", low=0.0, above=True)


Optimizer = AdamW | SGD


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate: linear over a share `warmup` of the steps, constant, cosine over `decay` to `final` x peak."""

    warmup: float = 0.1
    decay: float = 0.4
    final: float = 0.1

    def __post_init__(self) -> None:
        for name in ("warmup", "decay", "final"):
            require_number(self, name, low=0.0, high=1.0)
        both = self.warmup + self.decay
        require(both <= 1.0, "warmup + decay", both, "must be at most 1: shares of the same steps", "lower one of them")


@dataclass(frozen=True, kw_only=True)
class Train:
    """One run. A step sees `batch_size` sequences of `sequence_length` tokens, in `accumulation_steps` equal parts."""

    steps: int = 300
    batch_size: int = 16
    sequence_length: int = 256
    accumulation_steps: int = 1
    optimizer: Optimizer = field(default_factory=AdamW)
    schedule: Schedule = field(default_factory=Schedule)
    clip_grad_norm: float = 1.0
    mtp_loss_weight: float = 0.3
    precision: Precision = field(default_factory=Float32)
    eval_every: int = 100
    eval_sequences: int = 64
    checkpoint_every: int = 100
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        require_positive(self, "steps", "batch_size", "sequence_length", "accumulation_steps")
        require_positive(self, "eval_every", "eval_sequences", "checkpoint_every", "keep_checkpoints")
        require_kind(self, "optimizer", (AdamW, SGD))
        require_kind(self, "precision", (Float32, BFloat16, Float16, Float8Block))
        require_number(self, "clip_grad_norm", low=0.0, above=True)
        require_number(self, "mtp_loss_weight", low=0.0)
        parts = self.accumulation_steps
        require(
            self.batch_size % parts == 0,
            "accumulation_steps",
            parts,
            f"must divide batch_size={self.batch_size}",
            "use a divisor",
        )


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is read: files or folders of .txt, .jsonl(.gz|.zst), .parquet; none: the running Python's own library."""

    paths: tuple[str, ...] = ()
    validation: float = 0.05
    test: float = 0.05

    def __post_init__(self) -> None:
        for name in ("validation", "test"):
            require_number(self, name, low=0.0, high=0.4, above=True)
