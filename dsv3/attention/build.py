"""The one place where an attention config becomes a module."""

from dsv3.attention.latent import LatentAttention
from dsv3.attention.multi_head import MultiHeadAttention
from dsv3.config import Grouped, Latent, Model, MultiHead
from dsv3.config.rules import require

Module = MultiHeadAttention | LatentAttention


def build(model: Model, layer: int) -> Module:
    """The attention of block `layer`, counted from 0, multi-token prediction modules after the last block.

    Raises:
        ValueError: when the model has no such block.
    """
    blocks = model.num_hidden_layers + (0 if model.mtp is None else model.mtp.num_nextn_predict_layers)
    require(0 <= layer < blocks, "layer", layer, f"the model has blocks 0 to {blocks - 1}", "name one of them")
    match model.attention:
        case Latent():
            return LatentAttention(model)
        case MultiHead() | Grouped():
            return MultiHeadAttention(model)
