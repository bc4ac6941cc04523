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
    rank = parameters + gradients + optimizer + activations in flight + working memory

Working memory is the larger of two: the gradient of the logits in fp32 and in the activations' type, (4 + e) N V / tp;
or what one block has while backward is in it: what a recomputation policy made it keep less, the gradients of its
experts' rows, (4 + e) N K D, and a second copy of its largest weight's gradient, which is made before it is added.
Under ZeRO-3 the gathered weights of a block come on top. Not counted: buffers of collectives, the allocator's own
fragments, the CUDA context.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from bench.budget.activations import Batch, Kept, Policy, block, kept
from bench.budget.states import Recipe
from dsv3.config import Grouped, Model
from dsv3.config.rules import require, require_positive
from dsv3.model.cost import parameter_shapes

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

    def __post_init__(self) -> None:
        require_positive(self, "tp", "pp", "ep", "dp", "microbatches")
        require(self.zero in (0, 1, 2, 3), "zero", self.zero, "must be a stage of ZeRO, 0 to 3", "0 cuts nothing")
        rule = f"must divide dp={self.dp}: experts are spread over data-parallel replicas"
        require(self.dp % self.ep == 0, "ep", self.ep, rule, "use a divisor, or more replicas")

    @property
    def ranks(self) -> int:
        """How many processes there are."""
        return self.tp * self.pp * self.dp

    @property
    def name(self) -> str:
        """What is cut, in a word: "pp16 ep64 dp128 zero1"; "one rank" where nothing is."""
        cuts = {"tp": self.tp, "pp": self.pp, "ep": self.ep, "dp": self.dp}
        told = [f"{kind}{size}" for kind, size in cuts.items() if size > 1]
        told += [f"zero{self.zero}"] if self.zero else []
        told += [f"x{self.microbatches}"] if self.microbatches > 1 else []
        return " ".join(told + (["sp"] if self.sequence_parallel else [])) or "one rank"


@dataclass(frozen=True, kw_only=True)
class Share:
    """Bytes of one rank of a stage, by kind."""

    stage: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """The peak of the rank."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.working


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


def shares(model: Model, split: Split, recipe: Recipe, batch: Batch, policy: Policy = "none") -> tuple[Share, ...]:
    """A rank of each stage, first to last; `batch` is one microbatch of one replica.

    Raises:
        ValueError: for a split that does not come out even.
    """
    check(model, split)
    return tuple(_share(model, split, recipe, batch, policy, stage) for stage in range(split.pp))


def fullest(found: tuple[Share, ...]) -> Share:
    """The rank with the most bytes: the one that must fit."""
    return max(found, key=lambda share: share.total)


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


def held(model: Model, split: Split, stage: int) -> dict[str, int]:
    """Parameters that a rank of the stage multiplies with, experts apart from the rest."""
    found = {"dense": 0, "experts": 0}
    here = {"norm" if part == "head" else part for part in parts_of(model, split, stage)}
    here |= {"lm_head"} if "norm" in here else set()
    tied = model.tie_word_embeddings and "norm" in here  # the head's copy on the last stage
    for name, shape in parameter_shapes(model).items():
        expert = ".mlp.experts." in name
        if _part(name) in here or (tied and name == "embed_tokens.weight"):
            found["experts" if expert else "dense"] += cut(name, shape, split)
    return found


def cut(name: str, shape: tuple[int, ...], split: Split) -> int:
    """Elements of a parameter that one rank holds."""
    size = prod(shape) // (split.ep if ".mlp.experts." in name else 1)
    return size // split.tp if CUT & {*name.split(".")} else size


def copies(split: Split) -> dict[str, int]:
    """How many ranks hold the same parameters."""
    return {"dense": split.dp, "experts": split.dp // split.ep}


def _share(model: Model, split: Split, recipe: Recipe, batch: Batch, policy: Policy, stage: int) -> Share:
    parameters, alike = held(model, split, stage), copies(split)

    def states(each: int, cut_from: int) -> int:
        ways = {kind: alike[kind] if split.zero >= cut_from else 1 for kind in alike}
        return sum(each * -(-parameters[kind] // ways[kind]) for kind in parameters)

    everything, here = kept(model, batch, policy), parts_of(model, split, stage)
    one = sum(divided(item, split) for part in here if part in everything for item in everything[part])
    return Share(
        stage=stage,
        parameters=states(recipe.weight, 3),
        gradients=states(recipe.gradient, 2),
        optimizer=states(recipe.optimizer, 1),
        activations=one * min(split.microbatches, split.pp - stage),
        working=_working(model, split, recipe, batch, policy, here),
    )


def divided(item: Kept, split: Split) -> int:
    """A kept item's bytes on one of the tensor-parallel ranks."""
    whole = item.axis == "rows" or (item.axis == "tokens" and not split.sequence_parallel)
    return item.bytes if whole else item.bytes // split.tp


def _working(model: Model, split: Split, recipe: Recipe, batch: Batch, policy: Policy, here: tuple[str, ...]) -> int:
    head = (4 + batch.element) * batch.tokens * model.vocab_size // split.tp if "head" in here else 0
    inside = max(_inside(model, split, recipe, batch, policy, here), default=0)
    return max(head, inside)


def _inside(
    model: Model, split: Split, recipe: Recipe, batch: Batch, policy: Policy, here: tuple[str, ...]
) -> Iterator[int]:
    """Working memory of backward in each kind of block on the stage."""
    layers = {model.is_moe_layer(_layer(model, part)): _layer(model, part) for part in here if "." in part}
    for moe, layer in layers.items():
        without = sum(divided(item, split) for item in block(model, layer, batch, "none"))
        with_policy = sum(divided(item, split) for item in block(model, layer, batch, policy))
        rows = batch.tokens * (model.moe.num_experts_per_tok if moe and model.moe else 1)
        gradients = (4 + batch.element) * rows * model.hidden_size
        prefix = f"layers.{min(layer, model.num_hidden_layers - 1)}."
        sizes = [cut(name, shape, split) for name, shape in parameter_shapes(model).items() if name.startswith(prefix)]
        gathered = recipe.weight * sum(sizes) if split.zero == 3 else 0
        yield without - with_policy + gradients + recipe.weight * max(sizes) + gathered


def _layer(model: Model, part: str) -> int:
    kind, _, number = part.partition(".")
    return int(number) + (model.num_hidden_layers if kind == "mtp" else 0)


def _part(name: str) -> str:
    head, _, rest = name.partition(".")
    return f"{head}.{rest.partition('.')[0]}" if head in ("layers", "mtp") else head
