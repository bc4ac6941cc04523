"""One rank's share of a model that is split over many, by arithmetic. Nothing here is traced or run.

    ranks = tp x pp x dp; experts are spread over ep of the dp replicas, dp / ep ranks hold the same ones

    tp   embedding, head, heads of attention, inner width of feed-forward networks and experts are cut in tp pieces;
         MLA's down-projections, norms, the router and MTP's projection stand on every rank  (arXiv 1909.08053)
         sequence_parallel cuts activations between those along the sequence                 (arXiv 2205.05198)
    pp   layer i of L stands on stage floor(i pp / L); the embedding on the first, final norm, head, loss and MTP on
         the last. Under 1F1B stage s holds min(microbatches, pp - s) microbatches at once   (arXiv 2104.04473)
    ep   n_routed_experts / ep experts a rank; routing is balanced, so a rank still works on N K rows
    zero 1 cuts the optimizer's state over the ranks that hold the same parameters, 2 gradients too, 3 parameters too
                                                                                             (arXiv 1910.02054)

Under DualPipe a rank holds stage s and its mirror pp - 1 - s, half of the microbatches in each direction, and two ranks
the same weights; either of its stages is in flight as often as under 1F1B, which makes pp + 1 (arXiv 2412.19437 section
3.2.1; `dsv3.pipeline.schedules.dual_pipe`).
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

from bench.budget.activations import Kept
from dsv3.config import Grouped, Model
from dsv3.config.rules import require, require_positive
from dsv3.model.cost import parameter_shapes

Schedule = Literal["one_f_one_b", "dual_pipe"]  # names of `dsv3.pipeline.SCHEDULES`
SCHEDULES: tuple[Schedule, ...] = ("one_f_one_b", "dual_pipe")
HEADS = ("q_proj", "q_b_proj", "k_proj", "v_proj", "kv_b_proj", "o_proj", "importance")
CUT = {*HEADS, "embed_tokens", "lm_head", "gate_proj", "up_proj", "down_proj", "experts"}


@dataclass(frozen=True, kw_only=True)
class Split:
    """How many ways each kind of parallelism cuts, and what passes through a pipeline in a step."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    dp: int = 1
    zero: int = 0
    microbatches: int = 1
    sequence_parallel: bool = False
    schedule: Schedule = "one_f_one_b"

    def __post_init__(self) -> None:
        require_positive(self, "tp", "pp", "ep", "dp", "microbatches")
        require(self.zero in (0, 1, 2, 3), "zero", self.zero, "must be a stage of ZeRO, 0 to 3", "0 cuts nothing")
        rule = f"must divide dp={self.dp}: experts are spread over data-parallel replicas"
        require(self.dp % self.ep == 0, "ep", self.ep, rule, "use a divisor, or more replicas")
        require(self.schedule in SCHEDULES, "schedule", self.schedule, f"must be {' or '.join(SCHEDULES)}", "pick one")
        if self.schedule == "dual_pipe":
            require(self.pp % 2 == 0, "pp", self.pp, "must be even: DualPipe pairs ranks", f"use {self.pp + 1}")
            most = self.microbatches
            rule = f"must be even and at least 2 pp = {2 * self.pp}: DualPipe sends half of them from each end"
            require(most % 2 == 0 and most >= 2 * self.pp, "microbatches", most, rule, "use more, or one_f_one_b")

    @property
    def ranks(self) -> int:
        """How many processes there are."""
        return self.tp * self.pp * self.dp

    @property
    def twice(self) -> int:
        """How many stages a rank of the pipeline holds, and how many of its ranks hold a stage."""
        return 2 if self.schedule == "dual_pipe" else 1

    def stages(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank of the pipeline holds."""
        return (rank, self.pp - 1 - rank)[: self.twice]

    @property
    def name(self) -> str:
        """What is cut, in a word: "pp16 ep64 dp128 zero1"; "one rank" where nothing is."""
        cuts = {"tp": self.tp, "pp": self.pp, "ep": self.ep, "dp": self.dp}
        told = [f"{kind}{size}" for kind, size in cuts.items() if size > 1]
        told += [f"zero{self.zero}"] if self.zero else []
        told += [f"x{self.microbatches}"] if self.microbatches > 1 else []
        told += ["sp"] if self.sequence_parallel else []
        told += [self.schedule] if self.schedule != "one_f_one_b" else []
        return " ".join(told) or "one rank"


def check(model: Model, split: Split) -> None:
    """Refuse a split that does not come out even.

    Raises:
        ValueError: naming the number, what it must divide, and what to do.
    """
    heads = model.attention.num_attention_heads
    even = {"num_attention_heads": heads, "vocab_size": model.vocab_size}
    if isinstance(model.attention, Grouped):
        even["num_key_value_heads"] = model.attention.num_key_value_heads
    if model.moe is None or model.first_k_dense_replace > 0:
        even["intermediate_size"] = model.intermediate_size
    if model.moe is not None:
        even["moe_intermediate_size"] = model.moe.moe_intermediate_size
    for name, size in even.items():
        require(size % split.tp == 0, "tp", split.tp, f"must divide {name}={size}", "use a common divisor")
    layers = model.num_hidden_layers
    rule = f"must be at most num_hidden_layers={layers}: a stage has at least one"
    require(split.pp <= layers, "pp", split.pp, rule, "use fewer stages")
    experts = 1 if model.moe is None else model.moe.n_routed_experts
    rule = f"must divide n_routed_experts={experts}" if model.moe else "must be 1: the model has no experts"
    require(experts % split.ep == 0, "ep", split.ep, rule, "use a divisor")


def parts_of(model: Model, split: Split, stage: int) -> tuple[str, ...]:
    """The parts of the model on a stage, by the names of `activations.kept`."""
    layers = range(model.num_hidden_layers)
    here = [f"layers.{layer}" for layer in layers if layer * split.pp // model.num_hidden_layers == stage]
    last = stage == split.pp - 1
    depths = 0 if model.mtp is None else model.mtp.num_nextn_predict_layers
    return (
        *(["embed_tokens"] if stage == 0 else []),
        *here,
        *(["head", *(f"mtp.{depth}" for depth in range(depths))] if last else []),
    )


def held(model: Model, split: Split) -> tuple[dict[str, int], ...]:
    """Parameters that each rank of the pipeline multiplies with, experts apart from the rest."""
    sizes: dict[str, dict[str, int]] = {}
    for name, shape in parameter_shapes(model).items():
        kind = "experts" if ".mlp.experts." in name else "dense"
        sizes.setdefault(_part(name), {"dense": 0, "experts": 0})[kind] += cut(name, shape, split)
    found = []
    for rank in range(split.pp):
        here = {part for stage in split.stages(rank) for part in parts_of(model, split, stage)}
        if model.tie_word_embeddings and "head" in here:
            here.add("embed_tokens")  # the head's copy on the last stage
        found.append({kind: sum(sizes[part][kind] for part in here) for kind in ("dense", "experts")})
    return tuple(found)


def cut(name: str, shape: tuple[int, ...], split: Split) -> int:
    """Elements of a parameter that one rank holds."""
    size = prod(shape) // (split.ep if ".mlp.experts." in name else 1)
    return size // split.tp if CUT & {*name.split(".")} else size


def copies(split: Split) -> dict[str, int]:
    """How many ranks hold the same parameters."""
    return {"dense": split.twice * split.dp, "experts": split.twice * split.dp // split.ep}


def divided(item: Kept, split: Split) -> int:
    """A kept item's bytes on one of the tensor-parallel ranks."""
    whole = item.axis == "rows" or (item.axis == "tokens" and not split.sequence_parallel)
    return item.bytes if whole else item.bytes // split.tp


def _part(name: str) -> str:
    """Where a parameter stands, by the names of `activations.kept`."""
    first, _, rest = name.partition(".")
    if first in ("norm", "lm_head"):
        return "head"
    return f"{first}.{rest.partition('.')[0]}" if first in ("layers", "mtp") else first
