"""The mixture-of-experts room: router -> capacity -> dispatch -> experts; balance beside them, load statistics after.

`placement` says which rank holds which expert, `isolation` what separate gradient paths mean; `kernels` has the C++ and
the Triton, `fastest` the table that says which dispatch a CPU takes.

A layer returns its output and a `Routing`; losses, bias updates and statistics are functions of that value.
"""

from dsv3.moe.balance import balance_losses, quadratic_loss, sequence_loss, similarity_loss, switch_loss, z_loss
from dsv3.moe.bias import histogram_bias, proportional_bias, quantile_bias, sign_bias
from dsv3.moe.capacity import expert_capacity
from dsv3.moe.layer import MoELayer
from dsv3.moe.load import LoadStatistics, drop_floor, dropped_share, load_statistics, max_vio, max_vio_floor
from dsv3.moe.router import route
from dsv3.moe.routing import Routing

__all__ = [
    "LoadStatistics",
    "MoELayer",
    "Routing",
    "balance_losses",
    "drop_floor",
    "dropped_share",
    "expert_capacity",
    "histogram_bias",
    "load_statistics",
    "max_vio",
    "max_vio_floor",
    "proportional_bias",
    "quadratic_loss",
    "quantile_bias",
    "route",
    "sequence_loss",
    "sign_bias",
    "similarity_loss",
    "switch_loss",
    "z_loss",
]
