"""Configs survive JSON, and a digest names the content alone."""

import json
import subprocess
import sys

import pytest
from hypothesis import given

from dsv3.config import Config, Yarn, digest, from_json, presets, to_json, vary
from tests.config.strategies import configs


@given(configs)
def test_json_round_trip_gives_an_equal_config_with_the_same_digest(config: Config) -> None:
    again = from_json(to_json(config))
    assert again == config
    assert digest(again) == digest(config)


@given(configs, configs)
def test_digests_are_equal_exactly_when_configs_are(one: Config, other: Config) -> None:
    assert (digest(one) == digest(other)) == (one == other)


def test_a_whole_number_reads_alike_as_int_and_as_float() -> None:
    whole = Yarn(factor=40, original_max_position_embeddings=4096)
    point = Yarn(factor=40.0, original_max_position_embeddings=4096)
    assert whole == point
    assert digest(whole) == digest(point)


def test_the_digest_is_the_same_in_another_process() -> None:
    code = "from dsv3.config import digest, presets; print(digest(presets.tiny()))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest(presets.tiny())


def test_the_config_room_imports_no_torch() -> None:
    code = "import sys, dsv3.config.presets; print('torch' in sys.modules)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == "False"


def test_text_that_is_not_json_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON"):
        from_json("{")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plain: plain["model"].update(hidden=3), "Config.model.hidden: unknown field"),
        (lambda plain: plain["model"].pop("hidden_size"), "Config.model.hidden_size: missing field"),
        (lambda plain: plain["model"]["attention"].update(kind="Linear"), "Config.model.attention.kind='Linear'"),
        (lambda plain: plain["model"].update(hidden_size="wide"), "Config.model.hidden_size='wide'"),
        (lambda plain: plain["model"].update(hidden_size=1.5), "Config.model.hidden_size=1.5"),
        (lambda plain: plain["model"]["moe"].update(balance=3), "Config.model.moe.balance=3"),
        (lambda plain: plain.update(model=3), "Config.model=3"),
        (lambda plain: plain["model"]["moe"].update(n_group=3), "n_group=3"),
    ],
    ids=["unknown", "missing", "variant", "text", "fraction", "tuple", "object", "rule"],
)
def test_a_file_that_says_something_else_is_refused_by_name(change, message: str) -> None:
    plain = json.loads(to_json(presets.tiny()))
    change(plain)
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        from_json(json.dumps(plain))


def test_vary_changes_what_it_names_and_nothing_else() -> None:
    before = presets.tiny()
    after = vary(before, **{"model.moe.n_group": 2, "model.moe.topk_group": 1, "train.steps": 7})
    assert (after.model.moe.n_group, after.model.moe.topk_group, after.train.steps) == (2, 1, 7)
    assert vary(after, **{"model.moe.n_group": 4, "model.moe.topk_group": 2, "train.steps": 300}) == before


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("model.moe.n_grup", "has no field 'n_grup'; did you mean n_group"),
        ("trian", "did you mean train"),
        ("model.hidden_size.width", "128 has no fields"),
    ],
)
def test_vary_refuses_a_field_that_does_not_exist(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vary(presets.tiny(), **{path: 1})
