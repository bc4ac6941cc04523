"""The page of a training run, from the log that `python -m dsv3.train --out <out>/train` leaves beside the records.

The question is the least one may ask of a language model: does it predict held-out text better than counting words
does? Only whole lines of the log speak; others are named and counted, and the page stands on the rest.
"""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from ablations.traced import Prose, mark
from reports import figures, inlined, twins
from reports.numbers import plain
from reports.pages import Drawn, Page
from reports.tables import MISSING, Table

_SHOWN = 5  # lines that are named one by one
_CAPTION = "Bits per byte of held-out text, and how far the fullest expert is above the mean load"


def training_page(log: Path) -> tuple[Page | None, str]:
    """The page of the run that wrote this log, None where there is none or it has no evaluation yet; and in a sentence
    which lines were left out, "" for none.
    """
    lines, left_out = _lines(log)
    run = next((line for line in lines if line["kind"] == "run"), None)
    steps = [line for line in lines if line["kind"] == "step"]
    held_out = [line for line in lines if line["kind"] == "validation"]
    if run is None or not steps or not held_out:
        return None, left_out
    return _page(run, steps, held_out, [line for line in lines if line["kind"] == "test"]), left_out


def _page(run: Mapping[str, Any], steps: Sequence[Any], held_out: Sequence[Any], tests: Sequence[Any]) -> Page:
    return Page(
        name="training",
        title="training",
        question="Does a small model of this kind learn: does held-out text cost fewer bits than a bigram needs?",
        answers=(_answer(run, held_out, tests),),
        warning="One run at one seed: a seed's spread is not known from it.",
        arms=(),
        baseline="",
        figures=(_drawn(run, steps, held_out),),
        rulings=(),
        tables=(_held_out_table(run, held_out, tests), _step_table(steps)),
        failures=None,
        limits=("The text is small and the model smaller: nothing here says how a large one ranks.",),
        metrics=(),
        commands=("python -m dsv3.train --preset tiny --out reports/out/train", "python -m reports build"),
        origin=(("seed", str(run["seed"])), ("corpus", str(run["corpus"])), ("steps", str(steps[-1]["step"]))),
    )


def _lines(log: Path) -> tuple[list[dict[str, Any]], str]:
    """The whole lines of a log, each with its `source`, and in a sentence which were left out."""
    found, bad, layers = list[dict[str, Any]](), list[str](), set[int]()
    for number, line in enumerate(log.read_bytes().split(b"\n") if log.is_file() else (), start=1):
        if not line.strip():
            continue
        try:
            parsed = _parsed(line)
            if parsed["kind"] == "step":
                layers = layers or {len(parsed["max_vio"])}
                if len(parsed["max_vio"]) not in layers:
                    raise ValueError("has another number of layers than the steps before it")
            found.append(parsed | {"source": f"{log.parent.name}/{log.name}:{number}"})
        except (ValueError, RecursionError) as error:
            bad.append(f"line {number} ({error})")
    more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    said = f"{len(bad)} of {len(bad) + len(found)} lines are none of a training log and were left out"
    return found, f"{log.parent.name}/{log.name}: {said}: {'; '.join(bad[:_SHOWN])}{more}." if bad else ""


def _parsed(line: bytes) -> dict[str, Any]:
    """A line of a log, which has what the page reads of its kind.

    Raises:
        ValueError: any other.
    """
    parsed = json.loads(line)
    if not isinstance(parsed, dict) or not isinstance(parsed.get("kind"), str):
        raise ValueError("no object with a kind")
    match parsed["kind"]:
        case "run":
            fine = "bigram" in _named(parsed, "baselines") and {"seed", "corpus"} <= parsed.keys()
        case "step":
            several = parsed.get("max_vio")
            fine = bool(_named(parsed, "losses")) and isinstance(several, list) and all(map(_is_number, several))
            fine = fine and all(_is_number(parsed.get(name)) for name in ("step", "grad_norm", "lr"))
        case "validation" | "test":
            fine = bool(_named(parsed, "by_domain"))
            fine = fine and all(_is_number(parsed.get(name)) for name in ("step", "bits_per_byte"))
        case _:
            fine = True  # a kind that this page does not read
    if not fine:
        raise ValueError(f"lacks a part of a {parsed['kind']}, or has one that is no number")
    return parsed


def _named(line: Mapping[str, Any], name: str) -> Mapping[str, float]:
    """Numbers by name; none where one of them is no number."""
    found = line.get(name)
    return found if isinstance(found, dict) and all(map(_is_number, found.values())) else {}


def _is_number(value: object) -> bool:
    """Also NaN, which a skipped step may report; no whole number that a float cannot hold."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**53)


def _answer(run: Mapping[str, Any], held_out: Sequence[Any], tests: Sequence[Any]) -> Prose:
    last, bigram = held_out[-1], run["baselines"]["bigram"]
    counted = _from(run, plain(bigram))
    better = next((line for line in held_out if line["bits_per_byte"] < bigram), None)
    when = (
        f"below the bigram's {counted} from step {_from(better, better['step'])} on"
        if better
        else f"not below a bigram's {counted}"
    )
    test = f" ({_from(tests[-1], plain(tests[-1]['bits_per_byte']))} on the test split)" if tests else ""
    cost = _from(last, plain(last["bits_per_byte"]))
    return Prose.of(f"After {_from(last, last['step'])} steps held-out text costs {cost} bits per byte{test}, {when}.")


def _from(line: Mapping[str, Any], number: object) -> str:
    """A number of a line of the log, with the line as its source."""
    return mark(str(number), (line["source"],))


def _drawn(run: Any, steps: Sequence[Any], held_out: Sequence[Any]) -> Drawn:
    with figures.styled():
        picture = Picture(figsize=(8.6, 3.2), layout="constrained")
        left, right = picture.subplots(1, 2)
        _draw_held_out(left, run["baselines"], held_out)
        _draw_balance(right, steps)
    name = "training-curve"
    said = {"study": "training", "seed": run["seed"], "corpus": run["corpus"], "steps": steps[-1]["step"]}
    said["digest"] = sha256(json.dumps([run, *steps, *held_out], sort_keys=True).encode()).hexdigest()[:12]
    files = figures.render(picture, name, said)
    twin = tuple(twins.of_picture(picture, _CAPTION))
    inline = inlined.inline(files["svg"], name, _CAPTION, twin=bool(twin))
    return Drawn(name=name, caption=_CAPTION, titled=False, files=files, inline=inline, twin=twin)


def _draw_held_out(axes: Axes, baselines: Mapping[str, float], held_out: Sequence[Any]) -> None:
    at = [line["step"] for line in held_out]
    found = [line["bits_per_byte"] for line in held_out]
    axes.plot(at, found, color=figures.COLOURS[0], marker="o", markersize=3, label="model")
    for name, bits in baselines.items():
        axes.axhline(bits, color=figures.INK, linewidth=0.8, linestyle=":", label=name)
        axes.annotate(name, (1.01, bits), xycoords=("axes fraction", "data"), va="center", fontsize=7.5)
    axes.set(title="Held-out text", xlabel="step", ylabel="bits per byte")
    axes.grid(True)


def _draw_balance(axes: Axes, steps: Sequence[Any]) -> None:
    at = [line["step"] for line in steps]
    layers = list(zip(*(line["max_vio"] for line in steps), strict=True))
    for layer, values in enumerate(layers):
        colour = figures.COLOURS[layer % len(figures.COLOURS)]
        axes.plot(at, values, color=colour, linewidth=0.9, label=f"MoE layer {layer}")
    axes.set(title="Fullest expert", xlabel="step", ylabel="load above the mean / mean", ylim=(0, None))
    axes.grid(True)
    if layers:
        axes.legend(fontsize=7.5)


def _held_out_table(run: Mapping[str, Any], held_out: Sequence[Any], tests: Sequence[Any]) -> Table:
    domains, baselines = list(held_out[-1]["by_domain"]), run["baselines"]
    named = [("validation", held_out[-1]), *(("test", line) for line in tests[-1:])]
    rows = [
        (f"model, {split}", *_cells(line, line["bits_per_byte"], *map(line["by_domain"].get, domains)))
        for split, line in named
    ]
    rows += [
        (f"{name}, validation", *_cells(run, bits), *(MISSING for _ in domains)) for name, bits in baselines.items()
    ]
    return Table(caption="Bits per byte", note="one run", head=("", "all text", *domains), rows=tuple(rows))


def _step_table(steps: Sequence[Any]) -> Table:
    names = list(steps[-1]["losses"])
    shown = [steps[at] for at in sorted({0, len(steps) // 2, len(steps) - 1})]
    rows = tuple(
        (str(line["step"]), *_cells(line, *map(line["losses"].get, names), line["grad_norm"], line["lr"]))
        for line in shown
    )
    head = ("step", *(name.replace("_", " ") for name in names), "gradient norm", "learning rate")
    return Table(caption="Parts of the loss", note="first, middle and last step", head=head, rows=rows)


def _cells(line: Mapping[str, Any], *values: float | None) -> tuple[str, ...]:
    return tuple(MISSING if value is None else Prose.of(_from(line, plain(value))) for value in values)
