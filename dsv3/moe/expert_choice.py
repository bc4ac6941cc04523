"""Experts that choose tokens: the one routing that is even by construction, and that looks at the whole batch.

    expert i takes the N K / E tokens with the largest s_ni; the first N K mod E take one more, if some are left
    w_n = s_n on the experts that took n;   w_n / (sum w_n + 1e-20) if norm_topk_prob;   x routed_scaling_factor

Source: arXiv 2202.09368. A token may get more than K experts, or none: then only the shared ones and the residual see
it. It is not causal: a later token takes an earlier one's place, in the same sequence, so that a training loss under
expert choice is not that of a language model, and a microbatch by itself chooses otherwise than all together. At
inference a token chooses its K best experts, as everywhere: a model is judged on what it can do without the future.
"""

import torch

from dsv3.config import MoE
from dsv3.moe.router import gate_weights
from dsv3.moe.routing import Routing


def choose_tokens(routing: Routing, moe: MoE) -> Routing:
    """The same scores with the experts' choice: every pair is listed, and `kept` says which were chosen."""
    scores_NE = routing.scores
    tokens, experts = scores_NE.shape
    each, further = divmod(tokens * moe.num_experts_per_tok, experts)
    number = torch.arange(experts, device=scores_NE.device)
    takes_E = each + (number < further).long()
    order_NE = scores_NE.detach().argsort(dim=0, descending=True, stable=True)
    place_NE = torch.arange(tokens, device=scores_NE.device)[:, None].expand(tokens, experts)
    kept_NE = torch.empty_like(order_NE).scatter_(0, order_NE, place_NE) < takes_E
    indices_NE = number.repeat(tokens, 1)
    return Routing(
        indices_NE,
        gate_weights(scores_NE * kept_NE, indices_NE, moe),
        scores_NE,
        takes_E,
        kept_NE,
        logits=routing.logits,
        router=routing.router,
    )
