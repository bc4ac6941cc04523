"""`python -m dsv3.generate --checkpoint DIR --prompt "..."`: the continuation that a trained model gives a text.

    prefill    all tokens of the prompt in one forward pass, which fills the cache
    decode     one token at a time:  p = softmax(logits / temperature);  temperature 0 takes the most likely token

A text in training begins after an end of text, so the prompt is put after one too. Generation ends with an end of text.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from dsv3.config.rules import require, require_number, require_positive

if TYPE_CHECKING:
    import torch

    from dsv3.model import Transformer


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a command line asks for.

    Attributes:
        checkpoint: the folder of a run, as given to `python -m dsv3.train --out`.
        prompt: the text to continue; empty: a text of the model's own.
        tokens: how many tokens at most.
        temperature: 0 is greedy, 1 samples from the model's own probabilities.
        seed: of the sampling.
    """

    checkpoint: Path
    prompt: str = ""
    tokens: int = 100
    temperature: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "tokens")
        require_number(self, "temperature", low=0.0)


def generate(
    model: "Transformer", prompt: list[int], *, tokens: int, temperature: float, generator: "torch.Generator"
) -> Iterator[int]:
    """Up to `tokens` ids that follow `prompt`, each as soon as it is known; an end of text ends them and is not given.

    Raises:
        ValueError: an empty prompt, or more positions than the model has.
    """
    import torch

    from dsv3.attention import KeyValueCache
    from dsv3.data.tokenizer import END_OF_TEXT_ID

    require(len(prompt) > 0, "prompt", prompt, "must hold a token", "begin with the end of text")
    parameter = next(model.parameters())
    cache = KeyValueCache.empty(model.config, 1, len(prompt) + tokens, parameter.dtype, parameter.device)
    model.eval()
    given = prompt
    for _ in range(tokens):
        with torch.inference_mode():
            output = model(torch.tensor([given], device=parameter.device), cache=cache)
        assert output.cache is not None, "a model that is given a cache returns it"
        cache = output.cache
        token = choose(output.logits[0, -1], temperature, generator)
        if token == END_OF_TEXT_ID:
            return
        yield token
        given = [token]


def choose(logits: "torch.Tensor", temperature: float, generator: "torch.Generator") -> int:
    """One token by its logits [V]; the most likely at temperature 0."""
    import torch

    if temperature == 0.0:
        return int(logits.argmax())
    probabilities = (logits.double().cpu() / temperature).softmax(dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def continue_text(options: Options) -> str:
    """The continuation of the prompt, as text.

    Raises:
        ValueError: a folder that holds no run or no whole checkpoint.
    """
    import torch

    from dsv3.config import Config, from_json
    from dsv3.data import tokenizer as bpe
    from dsv3.model import Transformer
    from dsv3.precision import apply
    from dsv3.resilience import load_latest
    from dsv3.train.folder import Folder

    folder = Folder(options.checkpoint)
    complete = folder.config.exists() and folder.tokenizer.exists()
    rule = "holds no run: config.json and tokenizer.json belong to it"
    require(complete, "checkpoint", str(options.checkpoint), rule, "give the folder named by --out in training")
    config: Config = from_json(folder.config.read_text())
    _, state = load_latest(folder.checkpoints, parts=("model",))
    model = Transformer(config.model)
    apply(model, config.train.precision)
    model.load_state_dict(state["model"])
    tokenizer = bpe.load(folder.tokenizer)
    prompt = [bpe.END_OF_TEXT_ID, *tokenizer.encode(options.prompt).ids]
    generator = torch.Generator().manual_seed(options.seed)
    chosen = generate(model, prompt, tokens=options.tokens, temperature=options.temperature, generator=generator)
    return str(tokenizer.decode(list(chosen)))


def main(arguments: list[str]) -> int:
    """Print the prompt and its continuation; errors of the user end with one line and exit code 2."""
    description = "Continue a text with a model that `python -m dsv3.train --out DIR` trained."
    options = tyro.cli(Options, prog="python -m dsv3.generate", description=description, args=arguments)
    try:
        print(options.prompt + continue_text(options))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
