"""Does sparse attention buy a better language model? Bytes of real text in rows of 8192.

Two questions, with two answers. What do fewer keys cost, or buy, at equal tokens? And at equal CPU time, when a model
that sees fewer has read more? One training answers both (`bench.language_training`): its rate of learning is
constant, so that each look is fair at its own tokens. Judged is the trailing loss, over the last quarter of each row,
where attention reaches furthest.

    equal tokens   after as many steps as dense attention takes in all
    equal time     after s / ratio steps: s of dense attention in all, the ratio that of a step's CPU time, which is
                   measured by itself, the arms interleaved; linear between looks. Where one of two arms was not trained
                   so far, both are taken at the latest time that both reached

So a training holds on any machine, and the time is that of one; with AVX-512 each takes about ten minutes of a core.
Dense attention is computed by this project's kernel, the faster of two; `sdpa` is the same model by torch's, and is
timed, not trained. Without the kernel there is no fair race, and no figure. All sparse arms see 512 keys per query, an
eighth of what causality leaves to the average one.

On the queries and keys of the trained dense model it is counted how much of attention's weight a choice of blocks
catches (`bench.attention_mass`): the tree, the flat choice, a random one and the best there is.

Not part of the report, since all seeds take hours: `python -m ablations run ablations/attention_language.py --profile
full`, in as many sittings as it takes, since finished cells are kept.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ablations.comparison import Compared
from ablations.equal_time import Gap, gap_at_equal_time, longest_rows
from ablations.evidence import Estimate, NoEvidence, compare, estimate
from ablations.study import Arm, Cell, Figure, Profile, Reading, Study, Value, grid
from bench.measurement import Measurement
from bench.record import Record
from dsv3.config import (
    AdamW,
    Blocks,
    Config,
    Everything,
    Hierarchical,
    Model,
    MultiHead,
    Schedule,
    Select,
    Train,
    Window,
    digest,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

    from dsv3.data.prepare import Prepared

SEEDS: Mapping[Profile, int] = {"quick": 1, "full": 7}
LENGTH: Mapping[Profile, int] = {"quick": 1024, "full": 8192}
STEPS: Mapping[Profile, int] = {"quick": 8, "full": 384}  # of dense attention
KEYS, BLOCK, FINE = 512, 64, 16  # keys seen, and tokens in a block
VOCABULARY = 257  # bytes, and the end of a text
LOOKS = 8  # at even distances, until dense attention is through
HELD_OUT = 12  # validation rows
GAIN, LOSS = 0.05, 0.01  # nats: what equal time should win, what equal tokens may cost
CAUGHT = 0.98  # of the weight that the flat choice catches
TREES: Mapping[str, str] = {"hierarchical": "a tree of means", "best_first": "a tree of bounds"}
SELECTS: Mapping[str, Select] = {
    "dense": Blocks(keep=1.0, block_q=BLOCK, block_k=BLOCK),
    "sdpa": Everything(),
    "window": Window(size=KEYS),
    "hierarchical": Hierarchical(k=KEYS // BLOCK, block_q=BLOCK, block_k=BLOCK),
    "best_first": Hierarchical(k=KEYS // FINE, block_q=FINE, block_k=FINE, search="best_first"),
}
CHANGES: Mapping[str, str] = {
    "dense": "every visible key, by this project's kernel",
    "window": f"the last {KEYS} keys",
    "hierarchical": f"blocks of {BLOCK} keys, found down a tree of means, for {BLOCK} queries at once",
    "best_first": f"blocks of {FINE} keys of the largest bound, for {FINE} queries at once; attention_mass is that of "
    f"blocks of {BLOCK} for {BLOCK}, as in all arms",
    "sdpa": "every visible key, by torch's kernel: timed, not trained",
    "bigram": "counts of neighbouring bytes, what every arm has to pass",
    "blocks": "of the trained dense model: the blocks whose mean key scores highest",
    "random": "of the trained dense model: as many blocks at random",
    "oracle": "of the trained dense model: the blocks that hold most of its weight",
    "forced": "of the trained dense model: no blocks but those that every arm sees",
}
# Steps of each arm, in those of dense attention: about what its time buys with AVX-512, a little more. A window's steps
# take as long as those of the tree of means.
FURTHER: Mapping[str, float] = {"dense": 1.0, "window": 2.375, "hierarchical": 2.375, "best_first": 1.875}


def configured(arm: str, *, length: int) -> Config:
    """The run of an arm: more steps than any takes."""
    model = Model(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=4,
        intermediate_size=384,
        attention=MultiHead(num_attention_heads=2, head_dim=64, select=SELECTS[arm]),
        max_position_embeddings=length,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    train = Train(
        steps=4000,
        batch_size=1,
        sequence_length=length,
        optimizer=AdamW(lr=2e-3),
        schedule=Schedule(warmup=0.01, decay=0.0),
    )
    return Config(model=model, train=train)


def cells(profile: Profile) -> tuple[Cell, ...]:
    """Per seed a cell that times a step of every arm, and one for each training; and one of counts of bytes."""
    length, steps = LENGTH[profile], STEPS[profile]
    counted = grid(arms=("bigram",), seconds=60, timed=False, part=("counts",), length=(length,))
    timed = grid(seeds=range(SEEDS[profile]), seconds=length / 50, part=("step",), length=(length,), threads=(1,))
    each = [
        grid(
            arms=tuple(FURTHER),
            seeds=(seed,),
            seconds=length * steps / 2500,
            timed=False,
            part=("training",),
            length=(length,),
            steps_of_dense=(steps,),
        )
        for seed in range(SEEDS[profile])
    ]
    return sum(each, counted + timed)


def measure(cell: Cell) -> list[Reading]:
    """The bigram's loss; or times of a step; or one training, and of dense attention what choices would catch."""
    import torch

    from dsv3.attention import why_not_kernel
    from dsv3.data.prepare import prepare

    torch.set_num_threads(1)
    length = int(cell.axes["length"])
    if cell.arm != "bigram" and (missing := why_not_kernel(torch.empty(0))):
        # Not STUDY.baseline: the digest of a cell's code would then hold every word of the page.
        return [Reading(arm=cell.arm or "dense", metric="trailing_loss", pending=missing)]
    if cell.axes["part"] == "step":
        return _steps(length, cell.seed or 0)
    prepared = prepare(configured("dense", length=length).data, VOCABULARY)
    if cell.arm == "bigram":
        return _bigram(prepared, length)
    return _training(cell, prepared)


def _steps(length: int, seed: int) -> list[Reading]:
    """CPU time of a training step of every arm, interleaved."""
    from bench.meters.paired import process_clock, summary, time_block
    from bench.training import step_on_random_tokens

    arms = {arm: step_on_random_tokens(configured(arm, length=length), seed, "cpu") for arm in SELECTS}
    for step in arms.values():
        step()
    blocks = [time_block(arms, 2 * seed + block, 1, process_clock) for block in range(3)]
    return [
        Reading(arm=arm, measurement=found, axes={"phase": "step"} if found.metric == "cpu_seconds" else {})
        for arm in arms
        for found in summary(blocks, arm, "dense", "step", ("cpu",))
    ]


def _bigram(prepared: "Prepared", length: int) -> list[Reading]:
    import numpy as np

    from bench.language_training import TRAILING
    from dsv3.data.baseline import Bigram
    from dsv3.data.pack import heldout_rows

    rows = heldout_rows(prepared.validation, length, HELD_OUT)[0].numpy()
    bigram = Bigram.fit(np.asarray(prepared.train.tokens), VOCABULARY)
    last = length // TRAILING
    nats = bigram.nats(rows[:, -last - 1 :]) / (len(rows) * last)
    found = Measurement(metric="trailing_loss", value=nats)
    return [Reading(arm="bigram", measurement=found, corpus=prepared.digest)]


def _training(cell: Cell, prepared: "Prepared") -> list[Reading]:
    from bench.language_training import learn

    assert cell.arm is not None, "each arm trains in a cell of its own"
    assert cell.seed is not None, "a training has a seed"
    config, dense = configured(cell.arm, length=int(cell.axes["length"])), int(cell.axes["steps_of_dense"])
    steps, every = round(dense * FURTHER[cell.arm]), max(1, dense // LOOKS)
    try:
        looks, model = learn(config, prepared, cell.seed, steps=steps, every=every, held_out=HELD_OUT)
    except FloatingPointError as diverged:
        return [Reading(arm=cell.arm, metric="trailing_loss", failed=str(diverged))]
    labels: dict[str, Any] = {"arm": cell.arm, "config": digest(config), "corpus": prepared.digest}
    rows = []
    for look in looks:
        for metric in ("trailing_loss", "loss"):
            value = Measurement(metric=metric, value=getattr(look, metric))
            rows.append(Reading(measurement=value, axes={"at": "a look", "steps": look.step}, **labels))
            if look.step == dense:
                rows.append(Reading(measurement=value, axes={"at": "equal tokens"}, **labels))
    return rows + (_masses(cell, prepared, model) if cell.arm == "dense" else [])


def _masses(cell: Cell, prepared: "Prepared", trained: Any) -> list[Reading]:
    """What choices of blocks catch of the trained model's attention, over some held-out rows, by length."""
    from statistics import fmean

    from bench.attention_mass import attended, masses
    from dsv3.data.pack import heldout_rows
    from dsv3.model import Transformer

    length = int(cell.axes["length"])
    model = Transformer(configured("sdpa", length=length).model)
    model.load_state_dict(trained.state_dict())
    choice = SELECTS["hierarchical"]
    assert isinstance(choice, Hierarchical), "the tree whose blocks are looked at"
    flat, rows = Blocks(k=choice.k, block_q=BLOCK, block_k=BLOCK), heldout_rows(prepared.validation, length, 4)[0]
    readings = []
    for shorter in (length // 4, length // 2, length):
        found = [
            masses(q, k, flat, scale=scale, seed=row)
            for row, text in enumerate(rows)
            for q, k, scale in attended(model, text[:shorter])
        ]
        for arm in found[0]:
            for of, which in (("free keys", 0), ("all keys", 1)):
                value = Measurement(metric="attention_mass", value=fmean(one[arm][which] for one in found))
                axes: dict[str, Value] = {"tokens": shorter, "of": of}
                readings.append(Reading(arm=arm, measurement=value, axes=axes, corpus=prepared.digest))
    return readings


def answer(records: Sequence[Record]) -> str:
    """What was asked and is not shown; then each tree against a window and dense attention, and what a tree catches."""
    records = longest_rows(records)
    trees = {words: found for arm, words in TREES.items() if (found := _gaps(records, arm))}
    if not trees:
        raise NoEvidence("no tree has been trained beside dense attention and a window")
    missed = _missed(trees)
    said = [f"Asked, and not shown: {'; '.join(missed)}."] if missed else []
    for words, gaps in trees.items():
        window, dense = (
            f"{_apart(gaps[other, 'tokens'])} at equal tokens and {_apart(gaps[other, 'time'])} at equal CPU time"
            f"{gaps[other, 'time'].until}"
            for other in ("window", "dense")
        )
        said.append(
            f"Compared with a window of as many keys, the trailing loss of {words} in nat/token is {window}; compared "
            f"with dense attention, {dense}."
        )
    return " ".join(said + _past_bigram(records) + _caught(records))


def _gaps(records: Sequence[Record], arm: str) -> dict[tuple[str, str], Gap]:
    """From a window and from dense attention, at equal tokens and at equal time; empty where one is missing."""
    found = {}
    with suppress(NoEvidence):
        for other in ("window", "dense"):
            found[other, "tokens"] = Gap(nats=_gap(records, arm, other), share=1.0)
            found[other, "time"] = gap_at_equal_time(records, arm, other)
        return found
    return {}


def _missed(trees: Mapping[str, Mapping[tuple[str, str], Gap]]) -> list[str]:
    """What was asked and intervals do not show, each with the trees it is not shown of."""
    asked = (
        ("to beat a window of as many keys at equal tokens", ("window", "tokens"), 0.0),
        ("to beat it at equal CPU time", ("window", "time"), 0.0),
        (f"to lose at most {LOSS:g} to dense attention at equal tokens", ("dense", "tokens"), LOSS),
        (f"to be {GAIN:g} below it at equal CPU time", ("dense", "time"), -GAIN),
    )
    said = []
    for words, key, most in asked:
        short = [tree for tree, gaps in trees.items() if (high := gaps[key].nats.high) is None or high >= most]
        said += [f"{words} ({', '.join(short)})"] if short else []
    return said


def _apart(gap: Gap) -> str:
    nats = gap.nats
    if nats.low is None or nats.high is None or nats.low <= 0 <= nats.high:
        return f"not told apart ({nats})"
    return f"higher by {nats}" if nats.low > 0 else f"lower by {nats.map(lambda value: -value)}"


def _past_bigram(records: Sequence[Record]) -> list[str]:
    """Which arms ended above what counts of pairs of bytes give, if any."""
    with suppress(NoEvidence):
        bigram = estimate(records, arm="bigram", metric="trailing_loss")
        ends = {arm: estimate(records, arm=arm, metric="trailing_loss", at="equal tokens") for arm in FURTHER}
        above = [arm for arm, loss in ends.items() if loss.value >= bigram.value]
        return [f"{' and '.join(above) or 'No arm'} ends above what counts of pairs of bytes give."]
    return []


def _caught(records: Sequence[Record]) -> list[str]:
    with suppress(NoEvidence):
        longest = max(int(row.axes["tokens"]) for row in records if row.metric == "attention_mass")
        caught = {arm: _mass(records, arm, longest) for arm in ("hierarchical", "blocks", "random")}
        where: dict[str, Value] = {"tokens": longest, "of": "free keys"}
        share = compare(records, arm="hierarchical", baseline="blocks", metric="attention_mass", ratio=True, **where)
        return [
            f"At {longest} tokens the tree of means catches {caught['hierarchical']} of the weight that could be "
            f"chosen, the flat choice {caught['blocks']}, a random one {caught['random']}: the tree's is {share} of "
            f"the flat choice's, where {CAUGHT:g} was asked."
        ]
    return []


def _gap(records: Sequence[Record], arm: str, baseline: str) -> Estimate:
    return compare(records, arm=arm, baseline=baseline, metric="trailing_loss", at="equal tokens")


def _mass(records: Sequence[Record], arm: str, tokens: int) -> Estimate:
    return estimate(records, arm=arm, metric="attention_mass", tokens=tokens, of="free keys")


def learning(table: Any) -> "Picture":
    """Trailing loss against tokens read and against the CPU time of so many steps, side by side."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure as Picture

    looks = table[table["at"] == "a look"] if "at" in table else table[:0]
    if looks.empty:
        raise NoEvidence("nothing was trained")
    longest = looks["length"].max()
    table, looks = table[table["length"] == longest], looks[looks["length"] == longest]
    picture = Picture(figsize=(6.4, 3.6), layout="constrained")
    left, right = picture.subplots(1, 2)
    seconds = table[(table["metric"] == "cpu_seconds") & (table["part"] == "step")].set_index("arm")["value"]
    for arm in FURTHER:
        line = looks[(looks["arm"] == arm) & (looks["metric"] == "trailing_loss")].sort_values("steps")
        line = line[line["n"] == line["n"].max()]  # a look of some seeds alone would bend the line of all
        ink = {"color": rcParams["text.color"], "linestyle": "--"} if arm == STUDY.baseline else {}
        left.plot(line["steps"] * line["length"] / 1e6, line["value"], marker=".", label=arm, **ink)
        if arm in seconds:
            right.plot(line["steps"] * seconds[arm], line["value"], marker=".", **ink)
    bigram = table[(table["metric"] == "trailing_loss") & (table["arm"] == "bigram")]["value"]
    for axes, label in ((left, "million tokens read"), (right, "seconds of CPU time")):
        axes.set(xlabel=label)
        axes.grid(visible=True)
        for value in bigram:
            axes.axhline(value, color="#7f7f7f", linestyle=":", label="bigram" if axes is left else None)
    right.set_ylim(left.get_ylim())
    left.set_ylabel("trailing loss, nat/token")
    picture.suptitle("What is learnt, by text read and by time spent")
    picture.legend(loc="outside lower center", ncols=5)
    return picture


STUDY = Study(
    name="attention_language",
    question="Does sparse attention buy a better language model?",
    arms=tuple(Arm(name, changes) for name, changes in CHANGES.items()),
    baseline="dense",
    metrics=("trailing_loss", "loss", "step_cpu_ratio", "cpu_seconds", "attention_mass"),
    seeds=SEEDS,
    cells=cells,
    measure=measure,
    compared=(
        Compared(
            "trailing_loss",
            margin=LOSS,
            why="what fewer keys may cost, said beforehand",
            where={"at": "equal tokens"},
            arms=("window", "hierarchical", "best_first"),
        ),
    ),
    configs={arm: configured(arm, length=LENGTH["full"]) for arm in SELECTS},
    figures=(
        Figure("learning", "What is learnt, by text read and by time spent", draw=learning),
        Figure(
            "equal_tokens",
            "Trailing loss at equal tokens, minus dense attention's",
            metric="trailing_loss",
            kind="interval",
            where={"at": "equal tokens"},
            against_baseline=True,
            reference=(LOSS, "what may be lost"),
        ),
        Figure(
            "mass",
            f"Attention's weight that {KEYS // BLOCK} blocks of {BLOCK} keys catch, of that which could be chosen",
            metric="attention_mass",
            x="tokens",
            where={"of": "free keys"},
            log="x",
        ),
    ),
    answer=answer,
    limits=(
        "A model of four layers and a million parameters that has read a few million bytes: what it wants from far "
        "away is little, and a better one may want more.",
        "Time is CPU time of one thread. At equal time the interval is over seeds: that of the ratio of times, far "
        "smaller, is not in it.",
        "One learning rate for all arms.",
    ),
)
