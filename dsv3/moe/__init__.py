"""The mixture-of-experts room: router -> capacity -> dispatch -> experts; balance beside them, load statistics after.

A layer returns its output and a `Routing`; losses, bias updates and statistics are functions of that value.
"""

from dsv3.moe.balance import balance_losses, quadratic_loss, sequence_loss, sign_bias, switch_loss
from dsv3.moe.capacity import dropped_share, expert_capacity
from dsv3.moe.layer import MoELayer
from dsv3.moe.router import route
from dsv3.moe.routing import Routing

__all__ = [
    "MoELayer",
    "Routing",
    "balance_losses",
    "dropped_share",
    "expert_capacity",
    "quadratic_loss",
    "route",
    "sequence_loss",
    "sign_bias",
    "switch_loss",
]
