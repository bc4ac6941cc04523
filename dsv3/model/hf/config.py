"""config.json of a `deepseek_v3` or `deepseek_v32` checkpoint, to `Model` and back.

The second is the first with an indexer in every layer (DeepSeek-V3.2).

The file has two dialects: DeepSeek's own (`rope_theta` and `rope_scaling`, training-only keys such as
`aux_loss_alpha`) and that of transformers 5 (`rope_parameters`). Both are read; transformers' is written. A key that
is not understood, or whose value asks for something that this model does not do, is an error that names it: a setting
that is silently dropped is a different model.

The format has no word for six choices of ours (balance methods, capacity, which hidden state feeds multi-token
prediction, the embedding's initial weights, the weight of an indexer's loss, a model without experts). They are written
under one key, "dsv3", which transformers carries along unread; without it a checkpoint gets the defaults of `MoE`,
`MTP` and `Indexer`.
"""

import json
from dataclasses import replace
from typing import Any

from dsv3.config import (
    MTP,
    Balance,
    Capacity,
    Everything,
    Indexer,
    Latent,
    Model,
    MoE,
    Rope,
    Yarn,
    from_json,
    to_json,
)
from dsv3.config.rules import require

OURS = "dsv3"
DENSE, INDEXED = "deepseek_v3", "deepseek_v32"
CLASSES = {DENSE: "DeepseekV3ForCausalLM", INDEXED: "DeepseekV32ForCausalLM"}  # of transformers, by model_type

# Keys that say nothing about the function that the weights compute, each with the reason.
IRRELEVANT = {
    "_name_or_path": "where the checkpoint once lay",
    "architectures": "a class name of transformers; model_type decides",
    "auto_map": "remote code of older transformers",
    "aux_loss_alpha": "training only; a run's balance methods are set in its own config",
    "bos_token_id": "of the tokenizer",
    "chunk_size_feed_forward": "a memory switch of transformers' own loops",
    "dtype": "the tensors carry their types",
    "eos_token_id": "of the tokenizer",
    "ep_size": "how experts were spread over devices",
    "id2label": "of classifiers",
    "is_encoder_decoder": "transformers' own bookkeeping",
    "label2id": "of classifiers",
    "output_attentions": "what transformers returns",
    "output_hidden_states": "what transformers returns",
    "output_router_logits": "what transformers returns",
    "pad_token_id": "of the tokenizer",
    "pretraining_tp": "how a matrix product was split, not its value",
    "problem_type": "of classifiers",
    "return_dict": "what transformers returns",
    "seq_aux": "training only, as aux_loss_alpha",
    "torch_dtype": "the tensors carry their types",
    "transformers_version": "who wrote the file",
    "use_cache": "a default of transformers' generate",
}

# Keys that may only have the value that this model computes.
FIXED: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}

SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "first_k_dense_replace",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
)
LATENT = (
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)
INDEXER = ("index_n_heads", "index_head_dim", "index_topk")
EXPERTS = (
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_shared_experts",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
)
YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def read_config(text: str) -> Model:
    """The model that a checkpoint's config.json describes; `quantization_config` is left to the reader of the weights.

    Raises:
        ValueError: text that is not JSON, a key that is missing, not understood, or asks for what this model does not
            compute.
    """
    try:
        plain = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"config.json is not JSON ({error}); download or copy it again") from error
    require(isinstance(plain, dict), "config.json", plain, "must be an object of keys and values", "download it again")
    _check_keys(plain)
    _check_derived(plain)
    ours = plain.get(OURS, {})
    unknown = sorted(ours.keys() - {"balance", "capacity", "embedding_range", "indexer_loss_weight", "mtp_hidden"})
    require(not unknown, f"config.json {OURS}", unknown, "are not keys that this reader understands", "remove them")
    return Model(
        **{name: _need(plain, name) for name in SAME_NAME},
        attention=_read_attention(plain, ours),
        moe=_read_experts(plain, ours),
        mtp=_read_mtp(plain, ours),
        rope=_read_rope(plain),
        embedding_range=ours.get("embedding_range"),
    )


def write_config(model: Model) -> dict[str, Any]:
    """What config.json says about the model, in transformers' dialect.

    Raises:
        ValueError: for a choice that a reader of such checkpoints would not know of.
    """
    _check_expressible(model)
    attention, heads = model.attention, model.attention.num_attention_heads
    depths = 0 if model.mtp is None else model.mtp.num_nextn_predict_layers
    indexed = isinstance(attention.select, Indexer)
    kind, other = (INDEXED, "mlp_bias") if indexed else (DENSE, "rope_interleave")
    plain: dict[str, Any] = {"architectures": [CLASSES[kind]], "model_type": kind}
    plain |= {name: FIXED[name] for name in ("attention_bias", "attention_dropout", "hidden_act", other)}
    plain |= {name: getattr(attention.select, name) for name in INDEXER if indexed}
    plain |= {name: getattr(model, name) for name in SAME_NAME}
    plain |= {name: getattr(attention, name) for name in LATENT} | {"num_key_value_heads": heads}
    plain |= {"rope_parameters": _write_rope(model.rope), "num_nextn_predict_layers": depths}
    ours: dict[str, Any] = {} if model.embedding_range is None else {"embedding_range": model.embedding_range}
    if isinstance(attention.select, Indexer):
        ours["indexer_loss_weight"] = attention.select.loss_weight
    if model.moe is None:
        # Readers build experts from this layer on, so it says that none has any.
        return plain | {"first_k_dense_replace": model.num_hidden_layers} | ({OURS: ours} if ours else {})
    plain |= {name: getattr(model.moe, name) for name in EXPERTS}
    ours |= {"balance": json.loads(to_json(model.moe.balance)), "capacity": json.loads(to_json(model.moe.capacity))}
    if model.mtp is not None:
        ours["mtp_hidden"] = model.mtp.hidden
    return plain | {OURS: ours}


def _check_keys(plain: dict[str, Any]) -> None:
    kind = _need(plain, "model_type")
    rule = f"must be {' or '.join(map(repr, CLASSES))}"
    require(kind in CLASSES, "config.json model_type", kind, rule, "use another checkpoint")
    known = {*SAME_NAME, *LATENT, *EXPERTS, *FIXED, *IRRELEVANT, OURS}
    known |= {"num_key_value_heads", "num_nextn_predict_layers", "num_mtp_layers", "qk_head_dim", "head_dim"}
    known |= {"rope_parameters", "rope_scaling", "rope_theta", "quantization_config", "model_type"}
    known |= {*INDEXER, "layer_types", "mlp_layer_types"} if kind == INDEXED else set()
    for name, value in plain.items():
        rule = "is not a key that this reader understands, and dropping it could change the model"
        require(name in known, f"config.json {name}", value, rule, "remove it if it does not matter")
        if name in FIXED:
            rule = f"must be {FIXED[name]!r}, which is all that this model computes"
            require(value == FIXED[name], f"config.json {name}", value, rule, "use another checkpoint")


def _check_derived(plain: dict[str, Any]) -> None:
    heads, rope = _need(plain, "num_attention_heads"), _need(plain, "qk_rope_head_dim")
    layers, dense = _need(plain, "num_hidden_layers"), _need(plain, "first_k_dense_replace")
    derived = {
        "layer_types": ["indexed_attention"] * layers,
        "mlp_layer_types": ["dense"] * min(dense, layers) + ["sparse"] * (layers - dense),
        "num_key_value_heads": heads,
        "head_dim": rope,
        "qk_head_dim": _need(plain, "qk_nope_head_dim") + rope,
    }
    for name, value in derived.items():
        given = plain.get(name)
        rule = f"must be {value}, by the other keys"
        require(given in (None, value), f"config.json {name}", given, rule, "remove it")


def _need(plain: dict[str, Any], name: str) -> Any:
    if name not in plain:
        raise ValueError(f"config.json {name}: missing; the checkpoint cannot be read without it")
    return plain[name]


def _read_attention(plain: dict[str, Any], ours: dict[str, Any]) -> Latent:
    latent = Latent(**{name: _need(plain, name) for name in LATENT})
    if plain["model_type"] == DENSE:
        return latent
    given = {"loss_weight": ours["indexer_loss_weight"]} if "indexer_loss_weight" in ours else {}
    return replace(latent, select=Indexer(**{name: _need(plain, name) for name in INDEXER}, **given))


def _read_experts(plain: dict[str, Any], ours: dict[str, Any]) -> MoE | None:
    all_dense = _need(plain, "first_k_dense_replace") == _need(plain, "num_hidden_layers")
    if all_dense and not any(name in plain for name in EXPERTS):
        return None
    experts = MoE(**{name: _need(plain, name) for name in EXPERTS})
    kinds: dict[str, Any] = {"balance": tuple[Balance, ...], "capacity": Capacity}
    given = {name: from_json(json.dumps(ours[name]), kind) for name, kind in kinds.items() if name in ours}
    return replace(experts, **given)


def _read_mtp(plain: dict[str, Any], ours: dict[str, Any]) -> MTP | None:
    depths = plain.get("num_nextn_predict_layers", plain.get("num_mtp_layers", 0))
    if depths == 0:
        return None
    return MTP(num_nextn_predict_layers=depths, **({"hidden": ours["mtp_hidden"]} if "mtp_hidden" in ours else {}))


def _read_rope(plain: dict[str, Any]) -> Rope:
    given = dict(plain.get("rope_parameters") or plain.get("rope_scaling") or {})
    both = bool(plain.get("rope_parameters")) and bool(plain.get("rope_scaling"))
    require(not both, "config.json rope_scaling", given, "stands beside rope_parameters", "keep one of the two")
    thetas = {source["rope_theta"] for source in (plain, given) if source.get("rope_theta") is not None}
    require(len(thetas) == 1, "config.json rope_theta", sorted(thetas), "must be given, and once", "10000 is usual")
    given.pop("rope_theta", None)
    kinds = {given.pop(name) for name in ("rope_type", "type") if name in given} or {"default"}
    require(
        kinds <= {"default", "yarn"} and len(kinds) == 1,
        "config.json rope_type",
        kinds,
        "must be default or yarn",
        "use another checkpoint",
    )
    _drop_neutral(given)
    stray = kinds == {"default"} and given
    require(not stray, "config.json rope", given, "has settings of a scaling but no rope_type", "set rope_type")
    return Rope(theta=float(thetas.pop()), scaling=_read_yarn(given) if kinds == {"yarn"} else None)


def _drop_neutral(given: dict[str, Any]) -> None:
    for name, neutral in (("attention_factor", None), ("partial_rotary_factor", 1.0), ("truncate", True)):
        value = given.pop(name, neutral)
        rule = f"must be {neutral!r}, which is all that this model computes"
        require(value == neutral, f"config.json rope {name}", value, rule, "use another checkpoint")


def _read_yarn(given: dict[str, Any]) -> Yarn:
    unknown = sorted(given.keys() - set(YARN))
    require(
        not unknown, "config.json rope", unknown, "are not keys of YaRN that this reader understands", "remove them"
    )
    # Readers take a missing mscale for "no correction of the softmax scale", which is what 0 says; ours default to 1.
    return Yarn(**({"mscale": 0.0, "mscale_all_dim": 0.0} | given))


def _write_rope(rope: Rope) -> dict[str, Any]:
    if rope.scaling is None:
        return {"rope_type": "default", "rope_theta": rope.theta}
    return {"rope_type": "yarn", "rope_theta": rope.theta} | {name: getattr(rope.scaling, name) for name in YARN}


def _check_expressible(model: Model) -> None:
    attention, moe = model.attention, model.moe
    remedy = "save it with dsv3.resilience instead"
    kind = type(attention).__name__
    require(isinstance(attention, Latent), "attention", kind, "such a checkpoint has latent attention", remedy)
    known = isinstance(attention.select, Everything | Indexer)
    rule = "readers of such checkpoints attend to every key, or to those of an indexer"
    require(known, "select", attention.select, rule, remedy)
    if isinstance(attention.select, Indexer):
        rule = "readers of such checkpoints see what the indexer selects"
        require(attention.select.stage == "sparse", "stage", attention.select.stage, rule, "set it to sparse")
    if moe is None:
        require(model.mtp is None, "mtp", model.mtp, "readers give its block experts, and the model has none", remedy)
        return
    rule = "readers of such checkpoints score experts by sigmoid"
    require(moe.scoring_func == "sigmoid", "scoring_func", moe.scoring_func, rule, remedy)
    rule = "readers of such checkpoints expect a shared expert"
    require(moe.n_shared_experts > 0, "n_shared_experts", moe.n_shared_experts, rule, remedy)
    rule = "readers score a group by its two best experts, even a single group"
    require(moe.n_routed_experts > 1, "n_routed_experts", moe.n_routed_experts, rule, remedy)
