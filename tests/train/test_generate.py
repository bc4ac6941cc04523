"""Generation.

Decoding with the cache equals the full forward, sampling is seeded, and the command answers or says why not.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dsv3 import generate as generation
from dsv3.config import Data, vary
from dsv3.data.tokenizer import END_OF_TEXT_ID
from dsv3.model import Transformer
from dsv3.train import run
from tests.train import small


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", small.cache(tmp_path_factory.mktemp("cache")))
        data: Data = small.book(tmp_path_factory.mktemp("text"))
        run(vary(small.config(), data=data, **{"train.steps": 3}), out=out, progress=False)
        yield out


def drawn(model: Transformer, prompt: list[int], tokens: int, temperature: float, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return list(generation.generate(model, prompt, tokens=tokens, temperature=temperature, generator=generator))


def test_greedy_decoding_takes_what_a_full_forward_finds_most_likely() -> None:
    model = Transformer(small.config().model).eval()
    ids = [END_OF_TEXT_ID, 5, 17]
    for token in drawn(model, ids, tokens=12, temperature=0.0):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        assert token == int(logits.argmax())
        ids.append(token)
    assert len(ids) == 15


def test_generation_stops_at_the_end_of_a_text() -> None:
    model = Transformer(small.config().model)
    assert model.lm_head is not None
    torch.nn.init.zeros_(model.lm_head.weight)  # all tokens equally likely; argmax takes the first, the end of text
    assert drawn(model, [3], tokens=5, temperature=0.0) == []


def test_sampling_is_repeated_by_its_seed_and_cools_to_greedy() -> None:
    model = Transformer(small.config().model)
    assert drawn(model, [3], 20, 1.0, seed=1) == drawn(model, [3], 20, 1.0, seed=1)
    assert drawn(model, [3], 20, 1.0, seed=1) != drawn(model, [3], 20, 1.0, seed=2)
    assert drawn(model, [3], 20, 1e-4) == drawn(model, [3], 20, 0.0)


def test_samples_follow_the_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0])
    counts = torch.bincount(torch.tensor([generation.choose(logits, 2.0, generator) for _ in range(4000)]), minlength=3)
    torch.testing.assert_close(counts / 4000, (logits / 2).softmax(dim=0), atol=0.03, rtol=0)  # 4 sigma of 4000 draws


def test_the_command_prints_the_prompt_and_a_continuation(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", str(trained), "--prompt", "bado", "--tokens", "9"]
    assert generation.main(arguments) == 0
    first = capsys.readouterr().out
    assert first.startswith("bado")
    assert len(first) > len("bado\n")
    assert generation.main(arguments) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    "more, message",
    [
        (["--tokens", "100"], "max_length=102: must be between 1 and max_position_embeddings=64"),
        (["--checkpoint", "/no/such/run"], "holds no run"),
    ],
)
def test_what_cannot_be_generated_is_one_line(
    trained: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generation.main(["--checkpoint", str(trained), "--prompt", "b", *more]) == 2
    assert message in capsys.readouterr().err


def test_help_and_a_wrong_temperature_do_not_wait_for_torch() -> None:
    code = "import sys, dsv3.generate as g\ntry: g.main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    answers = [
        subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        for arguments in (["--help"], ["--checkpoint", "x", "--temperature", "-1"])
    ]
    assert [answer.returncode for answer in answers] == [0, 2]
    assert "usage" in answers[0].stdout
    assert "temperature=-1.0: must be a finite number >= 0" in answers[1].stderr
