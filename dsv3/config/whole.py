"""The whole of a run: the model, how it is trained, on what."""

from dataclasses import dataclass, field

from dsv3.config.model import Model
from dsv3.config.rules import require
from dsv3.config.train import Data, Train


@dataclass(frozen=True, kw_only=True)
class Config:
    """A model, its training and its data, checked against each other."""

    model: Model
    train: Train = field(default_factory=Train)
    data: Data = field(default_factory=Data)

    def __post_init__(self) -> None:
        length, most = self.train.sequence_length, self.model.max_position_embeddings
        rule = f"must be at most model.max_position_embeddings={most}"
        require(length <= most, "train.sequence_length", length, rule, "shorten the sequences or raise the maximum")
        ahead = 0 if self.model.mtp is None else self.model.mtp.num_nextn_predict_layers
        rule = f"must exceed the {ahead} tokens that multi-token prediction looks ahead"
        require(length > ahead, "train.sequence_length", length, rule, "lengthen the sequences or lower model.mtp")
        parts = self.train.accumulation_steps
        whole = parts == 1 or self.model.moe is None or not self.model.moe.reads_whole_steps
        rule = "must be 1 with QuantileBias(bins=None), which needs all scores of a step at once"
        require(whole, "train.accumulation_steps", parts, rule, "give it bins, whose counts add up")
