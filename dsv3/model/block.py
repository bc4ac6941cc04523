"""One pre-norm residual block (arXiv 2412.19437 figure 2):

x = x + Attention(RMSNorm(x))
x = x + FeedForward(RMSNorm(x))        SwiGLU in the first `first_k_dense_replace` blocks, experts after them
"""

from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv3.attention import Documents, LayerCache, Selection, attend_by_document, build
from dsv3.config import Model
from dsv3.layers import RMSNorm, SwiGLU
from dsv3.moe import MoELayer, Routing


class Block(nn.Module):
    """Block `layer` of the model, counted from 0; multi-token prediction modules hold the blocks after the last."""

    def __init__(self, model: Model, layer: int) -> None:
        super().__init__()
        width, inner = model.hidden_size, model.intermediate_size
        self.input_layernorm = RMSNorm(width, model.rms_norm_eps)
        self.self_attn = build(model, layer)
        self.post_attention_layernorm = RMSNorm(width, model.rms_norm_eps)
        self.mlp: MoELayer | SwiGLU = MoELayer(model) if model.is_moe_layer(layer) else SwiGLU(width, inner)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        cache: LayerCache | None = None,
        documents: Documents | None = None,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Routing | None, tuple[Selection | None, ...]]:
        """The block's output, what its router decided (None in a dense block), and which keys its attention kept
        (None: all), in each document where `documents` says where they begin. `lengths`: of rows before their padding.
        """
        normed = self.input_layernorm(x)
        if documents is None:
            attended, selection = self.self_attn(normed, cache=cache)
            selections: tuple[Selection | None, ...] = (selection,)
        else:
            attended, selections = attend_by_document(self.self_attn, normed, documents)
        x = x + attended
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoELayer):
            fed, routing = self.mlp(normed, lengths)
            return x + fed, routing, selections
        return x + self.mlp(normed), None, selections
