"""Which stored tensor holds which part of which parameter.

    ours                                        on disk, prefix model.layers.{i}.
    layers.{i}.*                                the same names
    layers.{i}.mlp.experts.gate_up [E, D, 2F]   mlp.experts.{e}.gate_proj.weight and .up_proj.weight [F, D]
    layers.{i}.mlp.experts.down [E, F, D]       mlp.experts.{e}.down_proj.weight [D, F]
    mtp.{m}.{enorm, hnorm, eh_proj}             the same names, i = number of layers + m
    mtp.{m}.block.*                             the same names
    mtp.{m}.norm                                shared_head.norm
    (copies of embedding and head)              embed_tokens and shared_head.head, beside each MTP module

A stored tensor corresponds to a view of a parameter, so that reading is `view.copy_(stored)` and writing is
`view.contiguous()`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from dsv3.config import Adaptive, Model
from dsv3.model.cost import mtp_depths, parameter_shapes

TIED_HEAD = "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a checkpoint: its name there, the parameter or buffer of ours, and which expert's which part of
    that.

    A `copy` repeats a parameter that another entry holds: a checkpoint may lack it, but may not contradict it.
    """

    stored: str
    ours: str
    expert: int | None = None
    part: int | None = None
    copy: bool = False

    def view(self, tensor: Tensor) -> Tensor:
        """The stored tensor's part of our parameter, in the stored layout."""
        if self.expert is None:
            return tensor
        one = tensor[self.expert]
        if self.part is not None:
            one = one.unflatten(-1, (2, -1))[..., self.part, :]
        return one.transpose(0, 1)


def entries(model: Model) -> Iterator[Entry]:
    """Every tensor of the model's checkpoint, in the order in which it is written."""
    for ours in parameter_shapes(model):
        stored = _stored(model, ours)
        if ours.endswith(".experts.gate_up"):
            yield from _experts(model, ours, stored.removesuffix("gate_up"), ("gate_proj", "up_proj"))
        elif ours.endswith(".experts.down"):
            yield from _experts(model, ours, stored.removesuffix("down"), ("down_proj",))
        else:
            yield Entry(stored=stored, ours=ours)
        if ours.endswith("mlp.gate.weight"):
            bias = ours.removesuffix("weight") + "e_score_correction_bias"
            yield Entry(stored=_stored(model, bias), ours=bias)
            if model.moe is not None and isinstance(model.moe.capacity, Adaptive):
                average = ours.removesuffix("gate.weight") + "largest_load"
                yield Entry(stored=_stored(model, average), ours=average)
    if model.tie_word_embeddings:
        yield Entry(stored=TIED_HEAD, ours="embed_tokens.weight", copy=True)
    for depth in range(mtp_depths(model)):
        yield from _shared_copies(model, depth)


def _stored(model: Model, ours: str) -> str:
    if ours == TIED_HEAD:
        return ours
    if not ours.startswith("mtp."):
        return f"model.{ours}"
    _, depth, rest = ours.split(".", 2)
    rest = rest.removeprefix("block.")
    if rest.startswith("norm."):
        rest = f"shared_head.{rest}"
    return f"model.layers.{model.num_hidden_layers + int(depth)}.{rest}"


def _experts(model: Model, ours: str, prefix: str, parts: tuple[str, ...]) -> Iterator[Entry]:
    assert model.moe is not None, "a name with experts comes from a model with experts"
    for expert in range(model.moe.n_routed_experts):
        for part, name in enumerate(parts):
            stored = f"{prefix}{expert}.{name}.weight"
            yield Entry(stored=stored, ours=ours, expert=expert, part=part if len(parts) > 1 else None)


def _shared_copies(model: Model, depth: int) -> Iterator[Entry]:
    prefix = f"model.layers.{model.num_hidden_layers + depth}"
    head = "embed_tokens.weight" if model.tie_word_embeddings else TIED_HEAD
    yield Entry(stored=f"{prefix}.embed_tokens.weight", ours="embed_tokens.weight", copy=True)
    yield Entry(stored=f"{prefix}.shared_head.head.weight", ours=head, copy=True)
