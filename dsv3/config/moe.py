"""Mixture of experts: who scores, how load is balanced, and what happens to an expert that is full.

Balance methods add up (DeepSeek-V3 runs `SignBias` and `SequenceLoss` together), so `balance` is a tuple:

    SignBias        b_i += rate * sign(mean load - load_i), for selection only     arXiv 2408.15664
    SequenceLoss    alpha * sum_i f_i P_i within each sequence                     arXiv 2412.19437 eq. 17-20
    SwitchLoss      alpha * E * sum_i f_i P_i over the batch                       arXiv 2101.03961 eq. 4-6
    QuadraticLoss   alpha * sum_i (p_i - 1/E)^2 over the batch                     the article, section 1.2
    ProportionalBias, QuantileBias   the bias moved by how far a load is off, or put where loads would be equal
    CentredSignBias                  SignBias, then minus the mean of b, which changes no choice
    SimilarityLoss  alpha * sum |W W^T - I| of the router's weight                 arXiv 2506.14038
    ExpertChoice    experts choose tokens in training, which is not causal         arXiv 2202.09368
    ZLoss           alpha * mean (log sum exp logits)^2, beside a method           arXiv 2202.08906

Capacity, in training only, is how many of N tokens an expert takes at most:

    Dropless            all that come (DeepSeek-V3)
    Fixed(factor)       ceil(N K / E * factor)
    Adaptive(momentum)  ceil(N K / E * a), with a the moving average of past steps' largest load / mean load

The article calls 1.2 x mean load "dynamic"; the mean load is N K / E by definition, so it is `Fixed(factor=1.2)`. What
becomes of a token that finds its expert full is the policy: `dsv3.moe.capacity` has them. None counts a capacity and
drops nothing: that is `Dropless`, and how much a capacity would have dropped is a function of the loads.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

from dsv3.config.rules import (
    require,
    require_kind,
    require_number,
    require_one_of,
    require_positive,
    require_whole,
)


@dataclass(frozen=True, kw_only=True)
class SignBias:
    """Bias on the scores, for selection only, moved by `rate` against the sign of the load error, without gradient."""

    rate: float = 0.001

    def __post_init__(self) -> None:
        require_number(self, "rate", low=0.0)


@dataclass(frozen=True, kw_only=True)
class SequenceLoss:
    """DeepSeek-V3's complementary loss within each sequence."""

    alpha: float = 0.0001

    def __post_init__(self) -> None:
        require_number(self, "alpha", low=0.0)


@dataclass(frozen=True, kw_only=True)
class SwitchLoss:
    """The load-balancing loss of Switch Transformer, over the whole batch."""

    alpha: float = 0.01

    def __post_init__(self) -> None:
        require_number(self, "alpha", low=0.0)


@dataclass(frozen=True, kw_only=True)
class QuadraticLoss:
    """The article's loss on mean probabilities; it never looks at the loads themselves."""

    alpha: float = 0.01

    def __post_init__(self) -> None:
        require_number(self, "alpha", low=0.0)


@dataclass(frozen=True, kw_only=True)
class ProportionalBias:
    """As `SignBias`, moved by `rate` times the load error as a share of the mean load."""

    rate: float = 0.01

    def __post_init__(self) -> None:
        require_number(self, "rate", low=0.0)


@dataclass(frozen=True, kw_only=True)
class QuantileBias:
    """Bias on the scores, for selection only, put where each expert would have had its share of the step's tokens.

    bins      of the histogram that the share is read from, for each expert; None: the exact share, from all scores of
              a step at once, which several microbatches or processes do not have
    momentum  how much of the old bias stays: 0 follows every step
    """

    bins: int | None = 1000
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if self.bins is not None:
            require_positive(self, "bins")
        require_number(self, "momentum", low=0.0)
        require(self.momentum < 1, "momentum", self.momentum, "must be below 1", "lower it: at 1 the bias never moves")


@dataclass(frozen=True, kw_only=True)
class CentredSignBias:
    """As `SignBias`, with biases that add up to zero."""

    rate: float = 0.001

    def __post_init__(self) -> None:
        require_number(self, "rate", low=0.0)


@dataclass(frozen=True, kw_only=True)
class SimilarityLoss:
    """SimBal's loss on a router that is not orthogonal; it sees neither tokens nor loads."""

    alpha: float = 0.1

    def __post_init__(self) -> None:
        require_number(self, "alpha", low=0.0)


@dataclass(frozen=True, kw_only=True)
class ExpertChoice:
    """Each expert takes the N K / E tokens that score it highest, in training only; a later token changes an earlier
    one's experts.
    """


@dataclass(frozen=True, kw_only=True)
class ZLoss:
    """ST-MoE's loss on the size of the router's logits."""

    alpha: float = 0.001

    def __post_init__(self) -> None:
        require_number(self, "alpha", low=0.0)


Bias = SignBias | CentredSignBias | ProportionalBias | QuantileBias
Balance = Bias | SequenceLoss | SwitchLoss | QuadraticLoss | SimilarityLoss | ZLoss | ExpertChoice


@dataclass(frozen=True, kw_only=True)
class Dropless:
    """Every token reaches all of its experts."""


Policy = Literal["probability", "position", "reroute"]


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """An expert takes at most ceil(N K / E * factor) tokens. The least probable, or the last in the batch, are dropped,
    or sent on to experts that have room.
    """

    factor: float
    policy: Policy = "probability"

    def __post_init__(self) -> None:
        require_number(self, "factor", low=0.0, above=True)
        require_one_of(self, "policy", get_args(Policy))


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """As `Fixed`, with a factor that is the moving average of past steps' largest loads, in mean loads.

    momentum  how much of the old average stays: 0 takes the last step's. The first step has no past, and drops nothing
    """

    momentum: float = 0.9
    policy: Policy = "probability"

    def __post_init__(self) -> None:
        require_number(self, "momentum", low=0.0)
        rule, remedy = "must be below 1", "lower it: at 1 the first step's load would stay"
        require(self.momentum < 1, "momentum", self.momentum, rule, remedy)
        require_one_of(self, "policy", get_args(Policy))


Capacity = Dropless | Fixed | Adaptive


@dataclass(frozen=True, kw_only=True)
class MoE:
    """A DeepSeekMoE layer: a token goes to `num_experts_per_tok` of the routed experts and to every shared one."""

    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_shared_experts: int = 1
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    balance: tuple[Balance, ...] = field(default_factory=lambda: (SignBias(), SequenceLoss()))
    capacity: Capacity = field(default_factory=Dropless)

    def __post_init__(self) -> None:
        require_positive(
            self, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"
        )
        require_whole(self, "n_shared_experts", low=0)
        require_one_of(self, "scoring_func", ("sigmoid", "softmax"))
        require_number(self, "routed_scaling_factor", low=0.0, above=True)
        require_kind(self, "capacity", get_args(Capacity))
        self._check_balance()
        self._check_expert_choice()
        self._check_groups()

    @property
    def reads_whole_steps(self) -> bool:
        """Whether a method needs all scores of a step at once, which no sum over its parts holds."""
        return any(isinstance(method, QuantileBias) and method.bins is None for method in self.balance)

    def _check_balance(self) -> None:
        known = get_args(Balance)
        tuple_of_known = isinstance(self.balance, tuple) and all(isinstance(method, known) for method in self.balance)
        rule = f"must be a tuple of {', '.join(kind.__name__ for kind in known)}"
        require(tuple_of_known, "balance", self.balance, rule, "write e.g. balance=(SignBias(),)")
        kinds = {type(method) for method in self.balance}
        require(len(kinds) == len(self.balance), "balance", self.balance, "names a method twice", "give each one once")
        moving = [method for method in self.balance if isinstance(method, Bias)]
        require(len(moving) < 2, "balance", self.balance, "moves one bias in several ways", "keep one of them")
        grouped = self.n_group > 1 and any(isinstance(method, QuantileBias) for method in moving)
        rule = "must be 1 with a QuantileBias, whose share is of all experts"
        require(not grouped, "n_group", self.n_group, rule, "leave it out, or take another bias")

    def _check_expert_choice(self) -> None:
        if not any(isinstance(method, ExpertChoice) for method in self.balance):
            return
        alone = all(isinstance(method, (ExpertChoice, SimilarityLoss, ZLoss)) for method in self.balance)
        rule = "has no load for another method to balance where experts choose"
        require(alone, "balance", self.balance, rule, "keep ExpertChoice() alone, or with a SimilarityLoss or ZLoss")
        rule = "must be 1 with ExpertChoice, whose experts choose among all tokens"
        require(self.n_group == 1, "n_group", self.n_group, rule, "leave it out")
        rule = "must be Dropless with ExpertChoice, whose experts are never overfull"
        require(isinstance(self.capacity, Dropless), "capacity", self.capacity, rule, "leave it out")

    def _check_groups(self) -> None:
        experts, groups, k = self.n_routed_experts, self.n_group, self.num_experts_per_tok
        require(experts % groups == 0, "n_group", groups, f"must divide n_routed_experts={experts}", "use a divisor")
        require(
            self.topk_group <= groups,
            "topk_group",
            self.topk_group,
            f"must be at most n_group={groups}",
            "lower topk_group",
        )
        reachable = experts // groups * self.topk_group
        rule = f"must be at most the {reachable} experts of {self.topk_group} of {groups} groups of {experts} experts"
        require(k <= reachable, "num_experts_per_tok", k, rule, "lower it, or raise n_routed_experts or topk_group")
        enough = groups == 1 or experts // groups >= 2
        require(
            enough,
            "n_group",
            groups,
            "a group is scored by its two best experts, so it holds two or more",
            "use fewer groups",
        )
