"""The variants have, together, every choice of the config room that a step can tell apart, and none twice."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

import dsv3.config
from bench import variants
from dsv3.config import Attention, Blocks, Config, Everything, digest

# What no step can tell apart, and why.
WITHOUT = {"Model.embedding_range=None": "it scales initial weights and nothing else"}


def choices(kind: type) -> set[str]:
    """Every choice below a config's class: the members of unions, the words of a Literal, yes and no, none and some."""
    found = {kind.__name__}
    for field in fields(kind):
        hint = get_type_hints(kind)[field.name]
        for option in options(hint):
            if is_dataclass(option):
                assert isinstance(option, type)
                found |= choices(option)
            else:
                found.add(f"{owner(kind, field.name)}.{field.name}={option}")
    return found


def options(hint: Any) -> Iterator[Any]:
    """What a field may be: classes of the config room, or in words; nothing where it is one number or text."""
    if is_dataclass(hint):
        yield hint
    elif get_origin(hint) is Literal:
        yield from map(repr, get_args(hint))
    elif hint is bool:
        yield from ("True", "False")
    elif get_origin(hint) is tuple:
        for part in get_args(hint):
            yield from options(part)
    elif type(None) in get_args(hint):
        others = [part for part in get_args(hint) if part is not type(None)]
        yield "None"
        for part in others:
            yield from options(part) if is_dataclass(part) else ("some",)
    else:
        for part in get_args(hint):
            yield from options(part)


def owner(kind: type, name: str) -> str:
    """The class that declares a field, which others inherit."""
    return next(base.__name__ for base in reversed(kind.__mro__) if name in vars(base).get("__annotations__", {}))


def made(value: Any) -> set[str]:
    """The choices that a config has made, in the words of `choices`."""
    found = {type(value).__name__}
    for field in fields(value):
        held = getattr(value, field.name)
        for part in held if isinstance(held, tuple) else (held,):
            if is_dataclass(part):
                found |= made(part)
            else:
                name = f"{owner(type(value), field.name)}.{field.name}"
                found |= {f"{name}={part!r}", f"{name}={'None' if part is None else 'some'}"}
    return found


def test_every_choice_of_a_config_is_in_some_variant() -> None:
    gated = set().union(*(made(config) for config in variants.variants().values()))
    missing = sorted(choices(Config) - gated - set(WITHOUT))
    assert not missing, (
        f"no variant of bench/variants.py has {', '.join(missing)}: what it costs is not gated. Add a variant to "
        'changes(), or put it into one where it hides nothing, and run python -m bench.gate --accept --reason "..."'
    )


def test_what_is_left_out_is_a_choice_and_has_no_variant() -> None:
    gated = set().union(*(made(config) for config in variants.variants().values()))
    assert set(WITHOUT) <= choices(Config) - gated


def test_the_walk_over_the_config_room_finds_unions_words_and_none() -> None:
    found = choices(Config)
    assert {kind.__name__ for kind in (*dsv3.config.attention.SELECTS, *get_args(Attention))} <= found
    assert {
        kind.__name__ for union in ("Balance", "Capacity") for kind in get_args(getattr(dsv3.config, union))
    } <= found
    assert {"Hierarchical.search='best_first'", "Blocks.rotated=False", "Latent.q_lora_rank=None"} <= found
    assert {"Blocks.top_p=some", "Model.moe=None", "MoE.norm_topk_prob=False"} <= found


@pytest.mark.parametrize("kind", get_args(Attention), ids=lambda kind: kind.__name__)
def test_every_attention_has_a_variant_with_all_keys_and_one_with_a_selection(kind: type) -> None:
    selects = [config.model.attention.select for config in variants.variants().values()]
    kinds = [type(config.model.attention) for config in variants.variants().values()]
    dense = {isinstance(select, Everything) for select, each in zip(selects, kinds, strict=True) if each is kind}
    assert dense == {True, False}, f"add a variant of {kind.__name__} to bench/variants.py"


def test_every_selection_reads_a_prompt_and_decodes_in_some_variant() -> None:
    served = {type(variants.variant(name).model.attention.select).__name__ for name in variants.SERVED}
    missing = sorted({kind.__name__ for kind in dsv3.config.attention.SELECTS} - served)
    assert not missing, f"no variant in SERVED of bench/variants.py selects by {', '.join(missing)}"


def test_experts_that_are_left_out_of_other_variants_are_in_some() -> None:
    layers = [config.model.moe for config in variants.variants().values() if config.model.moe]
    assert {moe.n_group > 1 for moe in layers} == {True, False}
    assert {moe.n_shared_experts > 0 for moe in layers} == {True, False}
    assert {moe.balance == () for moe in layers} == {True, False}


def test_blocks_leave_a_choice_and_one_variant_has_tiles_of_the_kernel() -> None:
    blocks = {
        name: config.model.attention.select
        for name, config in variants.variants().items()
        if isinstance(config.model.attention.select, Blocks)
    }
    assert [name for name, select in blocks.items() if select.block_k >= 16] == ["block_kernel"]
    for name, select in blocks.items():
        complete = (variants.LENGTH - select.block_q) // select.block_k
        if name != "block_kernel":  # as many keys as its blocks need would slow down all the others
            assert 2 < select.past(complete) < complete, f"{name}: the first and the previous block leave no choice"


def test_no_two_variants_are_the_same_config() -> None:
    configs = variants.variants()
    assert len({digest(config) for config in configs.values()}) == len(configs)


def test_a_choice_that_an_older_dsv3_lacks_leaves_the_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(dsv3.config, "Window")
    made = variants.works()
    assert made["base"]().build()
    with pytest.raises(AttributeError, match="Window"):
        made["window"]()
