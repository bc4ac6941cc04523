"""Multi-token prediction (arXiv 2412.19437 section 2.2): module m reads on from the hidden states and predicts one
token further.

    h^m_i      = Block_m( M_m [ RMSNorm(Emb(t_{i+m})) ; RMSNorm(h^{m-1}_i) ] )
    logits^m_i = Head(RMSNorm_m(h^m_i))                                          predicts t_{i+1+m}

Embedding and head are the main model's. Position i of depth m needs t_{i+m}, so a row of T tokens has T - m positions
at depth m, and of its targets the first m have no prediction there: depth m loses m targets per row. Positions keep
the main model's numbers i (rotation sees distances only, so numbering them by the shifted tokens would be the same
function).

Of packed documents the last m positions of each read on into the next one and predict nothing of their own; they come
after all others of their document, so no other sees them.

Two choices where sources differ:
  - The concatenation is [embedding ; hidden], as eh_proj's columns lie in the released checkpoint; the paper's
    equation 21 writes [hidden ; embedding].
  - `hidden` says what a module hands on. "pre_norm" is the paper's equation: h^0 before the final norm, and h^m.
    "post_norm" is what readers of the released checkpoint do: after the final norm, and after RMSNorm_m. Both are
    normalised again, so only the norm's weights are between them.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv3.attention import Documents, Selection
from dsv3.config import Model
from dsv3.layers import RMSNorm
from dsv3.model.block import Block
from dsv3.moe import Routing


class MultiTokenPrediction(nn.Module):
    """The module of depth `depth` + 1; its block comes after the model's last, so it has experts if the model has
    any.
    """

    def __init__(self, model: Model, depth: int) -> None:
        super().__init__()
        assert model.mtp is not None, "a model without model.mtp has no such module"
        width, eps = model.hidden_size, model.rms_norm_eps
        self.hands_on_normed = model.mtp.hidden == "post_norm"
        self.enorm = RMSNorm(width, eps)
        self.hnorm = RMSNorm(width, eps)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.block = Block(model, model.num_hidden_layers + depth)
        self.norm = RMSNorm(width, eps)

    def forward(
        self,
        hidden: Float[Tensor, "B T D"],
        embedded: Float[Tensor, "B T D"],
        *,
        documents: Documents | None = None,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"], Routing | None, tuple[Selection | None, ...]]:
        """From the hidden states of the depth before and the embeddings of the tokens m later, row by row of equal
        length:

        what the head reads, what the next depth reads, and what the block's router and attention decided.
        """
        joined = torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1)
        raw, routing, selections = self.block(self.eh_proj(joined), documents=documents, lengths=lengths)
        normed = self.norm(raw)
        return normed, normed if self.hands_on_normed else raw, routing, selections
