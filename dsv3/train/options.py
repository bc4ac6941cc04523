"""The command line of a run: a preset, every field of its config, and a few options of the run itself. No torch.

    --preset tiny --steps 50 --out runs/a                       a preset, and options of the run
    --train.optimizer.lr 1e-3 --model.moe.n-routed-experts 8    any field of its config
    --variant 'model.moe.capacity=Fixed(factor=1.2)'            another variant where the config has a choice of them

A variant is written as in Python and built from the classes of `dsv3.config`; nothing else is evaluated. Variants are
set first, then fields, so that the fields of a variant can be set too.
"""

import argparse
import ast
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dsv3 import config as configs
from dsv3.config import Config, from_json, presets, vary
from dsv3.config.rules import require
from dsv3.data.read import sources

DESCRIPTION = """Train a model on real text and measure it on held-out text, beside a unigram, a bigram and lzma.

Without --data the text is the running Python's own documentation and library. --help shows the fields of the chosen
--preset, e.g. --preset article_small --help. For several processes: torchrun --nproc-per-node 2 -m dsv3.train ..."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a command line asks for.

    Attributes:
        preset: a whole config by name. With --resume the saved config takes its place when none is given.
        variant: PATH=VARIANT, may be repeated: a choice of the config by its class, e.g. 'train.precision=BFloat16()',
            'model.moe.capacity=Fixed(factor=1.2)' or 'model.mtp=None'.
        steps: short for --train.steps.
        data: files or folders of .txt, .jsonl(.gz|.zst), .parquet (column "text"); short for --data.paths.
        seed: of the initial weights and of the order of the data.
        out: folder for the log and the checkpoints; without it nothing is written.
        resume: go on from the newest whole checkpoint in --out; from the start when there is none yet.
        overwrite: replace the run that --out holds.
        device: cpu or cuda.
        quiet: show nothing.
        config: the fields.
    """

    preset: Annotated[str, tyro.conf.arg(metavar="|".join(presets.every()))] = "tiny"
    variant: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    steps: int | None = None
    data: tuple[str, ...] = ()
    seed: int = 0
    out: Path | None = None
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    device: Literal["cpu", "cuda"] = "cpu"
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    config: Annotated[tyro.conf.AvoidSubcommands[Config], tyro.conf.arg(name="")]


def parse(arguments: Sequence[str]) -> Options:
    """Options from a command line, with --steps and --data put into the config.

    Raises:
        ValueError: unknown presets, variants or choices, contradictory options, values that the config refuses.
        SystemExit: --help, or options that tyro refuses (it prints why).
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--variant", action="append", default=[])
    first.add_argument("--out", type=Path)
    first.add_argument("--resume", action="store_true")
    early, _ = first.parse_known_args(arguments)
    config = _base(early.preset, early.out if early.resume else None)
    for text in early.variant:
        config = with_variant(config, text)
    default = Options(preset=early.preset or "tiny", config=config)
    options = tyro.cli(Options, prog="python -m dsv3.train", description=DESCRIPTION, default=default, args=arguments)
    return _checked(options)


def with_variant(config: Config, text: str) -> Config:
    """The config with `text`, "path=Variant(field=value)", applied.

    Raises:
        ValueError: text of another form, an unknown path or class, or a value that the config refuses.
    """
    path, equals, expression = text.partition("=")
    rule = "must be PATH=VARIANT, such as model.moe.capacity=Fixed(factor=1.2)"
    require(bool(equals), "--variant", text, rule, "name the choice and its new value")
    try:
        node = ast.parse(expression.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"--variant={text!r}: {error.msg}; write the variant as in Python") from error
    return vary(config, **{path.strip(): _value(node, text)})


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        kind = getattr(configs, node.func.id, None)
        known = ", ".join(name for name in configs.__all__ if name[0].isupper())
        variant = isinstance(kind, type) and node.func.id in configs.__all__
        require(variant, "--variant", text, f"{node.func.id} is none of {known}", "pick one of these")
        fields = {str(word.arg): _value(word.value, text) for word in node.keywords}
        try:
            return kind(**fields)  # type: ignore[misc]
        except TypeError as error:
            raise ValueError(f"--variant={text!r}: {error}; give the fields of {node.func.id}") from error
    if isinstance(node, ast.Tuple):
        return tuple(_value(part, text) for part in node.elts)
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        rule = "is neither Variant(field=value, ...) nor a plain value"
        raise ValueError(f"--variant={text!r}: {ast.unparse(node)} {rule}; write it as in Python") from error


def _base(preset: str | None, resumed: Path | None) -> Config:
    if preset is None and resumed is not None and (resumed / "config.json").exists():
        config: Config = from_json((resumed / "config.json").read_text())
        return config
    return presets.named(preset or "tiny")


def _checked(options: Options) -> Options:
    rule = "go on with a run or replace it, not both"
    require(not (options.resume and options.overwrite), "--overwrite", True, rule, "leave out one of the two")
    require(options.out is not None or not options.resume, "--resume", True, "needs the run's folder", "give --out")
    changes: dict[str, Any] = {}
    if options.steps is not None:
        changes["train.steps"] = options.steps
    if options.data:
        changes["data.paths"] = options.data
    config = vary(options.config, **changes)
    sources(config.data.paths)  # a missing path is told before anything slow
    return replace(options, config=config)
