"""Every way of balancing in words and at the strengths that `moe_balance` and `moe_recovery` try, and the small model
that they try it on.
"""

from collections.abc import Mapping

from dsv3.config import (
    Balance,
    CentredSignBias,
    Config,
    Dropless,
    ExpertChoice,
    MoE,
    MultiHead,
    ProportionalBias,
    QuadraticLoss,
    QuantileBias,
    SequenceLoss,
    SignBias,
    SimilarityLoss,
    SwitchLoss,
    ZLoss,
    presets,
    vary,
)

MICROBATCHES = 4  # of `switch`

STRENGTHS: Mapping[str, Mapping[str, tuple[Balance, ...]]] = {  # from weak to strong; "default" is the config's
    "none": {"default": ()},
    "quadratic": {
        "default": (QuadraticLoss(alpha=0.01),),
        "alpha 0.1": (QuadraticLoss(alpha=0.1),),
        "alpha 1": (QuadraticLoss(alpha=1.0),),
        "alpha 10": (QuadraticLoss(alpha=10.0),),
    },
    **{
        name: {
            "alpha 0.001": (SwitchLoss(alpha=0.001),),
            "default": (SwitchLoss(alpha=0.01),),
            "alpha 0.1": (SwitchLoss(alpha=0.1),),
            "alpha 1": (SwitchLoss(alpha=1.0),),
        }
        for name in ("switch", "global_batch")
    },
    "sequence": {
        "default": (SequenceLoss(alpha=0.0001),),
        "alpha 0.001": (SequenceLoss(alpha=0.001),),
        "alpha 0.01": (SequenceLoss(alpha=0.01),),
        "alpha 0.1": (SequenceLoss(alpha=0.1),),
        "alpha 1": (SequenceLoss(alpha=1.0),),
    },
    "sign_bias": {
        "rate 0.0003": (SignBias(rate=0.0003),),
        "default": (SignBias(rate=0.001),),
        "rate 0.003": (SignBias(rate=0.003),),
        "rate 0.01": (SignBias(rate=0.01),),
        "rate 0.03": (SignBias(rate=0.03),),
    },
    "centred_sign_bias": {"default": (CentredSignBias(rate=0.001),)},
    "proportional": {
        "rate 0.001": (ProportionalBias(rate=0.001),),
        "default": (ProportionalBias(rate=0.01),),
        "rate 0.03": (ProportionalBias(rate=0.03),),
        "rate 0.1": (ProportionalBias(rate=0.1),),
    },
    "quantile": {
        "momentum 0.97": (QuantileBias(momentum=0.97),),
        "momentum 0.9": (QuantileBias(momentum=0.9),),
        "momentum 0.5": (QuantileBias(momentum=0.5),),
        "default": (QuantileBias(momentum=0.0),),
    },
    "expert_choice": {"default": (ExpertChoice(),)},
    "similarity": {
        "alpha 0.001": (SimilarityLoss(alpha=0.001),),
        "alpha 0.01": (SimilarityLoss(alpha=0.01),),
        "default": (SimilarityLoss(alpha=0.1),),
        "alpha 1": (SimilarityLoss(alpha=1.0),),
    },
    "z_loss": {"default": (ZLoss(alpha=0.001),)},
    "deepseek_v3": {"default": (SignBias(rate=0.001), SequenceLoss(alpha=0.0001))},
}
CHANGES: Mapping[str, str] = {
    "none": "nothing balances",
    "quadratic": "the article's loss on mean probabilities",
    "switch": f"Switch loss of each microbatch, {MICROBATCHES} to a batch",
    "global_batch": "Switch loss of the whole batch",
    "sequence": "DeepSeek-V3's loss within each sequence, by itself",
    "sign_bias": "DeepSeek-V3's bias, by the sign of the load's error",
    "centred_sign_bias": "the same with biases that add up to zero: no choice changes",
    "proportional": "a bias by the size of the error",
    "quantile": "a bias at the quantile that gives each expert its share",
    "expert_choice": "experts choose tokens in training, which is not causal",
    "similarity": "SimBal's loss on the router's weight, which sees no load",
    "z_loss": "ST-MoE's loss on the size of logits, which balances nothing",
    "deepseek_v3": "bias and sequence loss together, as published",
}


ASKED = 10  # updates within which a method is asked to lead out of a collapse
EXACT: Mapping[str, tuple[Balance, ...]] = {
    "momentum 0.5": (QuantileBias(bins=None, momentum=0.5),),
    "default": (QuantileBias(bins=None),),
}


def ends(strengths: Mapping[str, tuple[Balance, ...]]) -> dict[str, tuple[Balance, ...]]:
    """The default and the strongest of strengths from weak to strong; where they are one, the next weaker one too."""
    names = list(strengths)
    chosen = names[-2:] if names[-1] == "default" else ["default", names[-1]]
    return {name: strengths[name] for name in chosen}


TRIED: Mapping[str, Mapping[str, tuple[Balance, ...]]] = {
    **{arm: ends(strengths) for arm, strengths in STRENGTHS.items()},
    "quantile_exact": EXACT,
}


def small_training(
    balance: tuple[Balance, ...],
    *,
    experts: int,
    k: int,
    layers: int,
    length: int,
    held_out: int,
    parts: int,
    steps: int,
    rows: int,
) -> Config:
    """A training with DeepSeek-V3's router and a shared expert under these methods, nothing dropped; `rows` of `length`
    tokens a step, in so many parts, and rows held out.
    """
    moe = MoE(
        n_routed_experts=experts,
        num_experts_per_tok=k,
        moe_intermediate_size=32,
        n_shared_experts=1,
        balance=balance,
        capacity=Dropless(),
    )
    return vary(
        presets.article_small(),
        **{
            "model.hidden_size": 64,
            "model.num_hidden_layers": layers,
            "model.intermediate_size": 128,
            "model.attention": MultiHead(num_attention_heads=2, head_dim=32),
            "model.moe": moe,
            "train.steps": steps,
            "train.batch_size": rows,
            "train.sequence_length": length,
            "train.eval_sequences": held_out,
            "train.accumulation_steps": parts,
            "train.optimizer.lr": 3e-3,
        },
    )


def parts_of(arm: str) -> int:
    """Into how many microbatches a method's batch is cut."""
    return MICROBATCHES if arm == "switch" else 1
