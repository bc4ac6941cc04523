"""What each single choice of sparse attention is worth: one factor changed at a time, on two tasks of recall.

    default       a tree of bounds (best_first) over blocks of 4 keys, 16 of 128 seen, chosen for each token and head
    block_k       longer or shorter blocks, as many keys seen                       sharing   who chooses together
    k             more or fewer blocks seen                                         rotated   compared before rotation
    block_q       a choice for 4 or 16 tokens, by the first of them                 search    what is compared, and how
    learns        how keys learn to be found; since bounds are not learnt, beside the tree of means: `search_beam`

Model, rows, training and tasks are those of `attention_quality`, but for two heads of 32 in place of one of 64, so that
there is something to share. Recall asks for one key among many, tracking for a chain of them. `sharing_group` has one
head of keys for both heads of queries, as grouped attention has, and so differs in that too.

An exploratory table: it says which choices deserve a study of their own. One factor at a time is blind to what two of
them do together, and one default is one point. Run by its path, as all seeds take hours: `python -m ablations run
ablations/attention_axes.py --profile full`.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress

from ablations.attention_quality import BLOCKS, BRANCHING, LEARNT, LENGTH, MARGIN, SEEN, STEPS, trained
from ablations.attention_quality import configured as configured_there
from ablations.comparison import Compared
from ablations.evidence import Estimate, NoEvidence, compare, estimate
from ablations.study import Arm, Cell, Figure, Profile, Reading, Study, Value, grid
from bench.record import Record
from dsv3.config import Attention, Blocks, Config, Grouped, Hierarchical, MultiHead, vary

SEEDS: Mapping[Profile, int] = {"quick": 2, "full": 10}
TASKS = ("recall", "tracking")
BLOCK = LENGTH // BLOCKS
DEFAULT = MultiHead(
    num_attention_heads=2,
    head_dim=32,
    select=Hierarchical(k=SEEN, block_q=1, block_k=BLOCK, branching=BRANCHING, search="best_first"),
)
MEANS = vary(DEFAULT, **{"select.search": "beam"})
AXES: Mapping[str, Mapping[str, tuple[Attention, str]]] = {  # by axis, each arm's attention and what it changes
    "block_k": {
        f"block_k_{size}": (
            vary(DEFAULT, **{"select.block_k": size, "select.k": SEEN * BLOCK // size}),
            f"blocks of {size} keys, as many keys seen",
        )
        for size in (2, 8, 16)
    },
    "k": {f"k_{seen}": (vary(DEFAULT, **{"select.k": seen}), f"{seen} blocks seen") for seen in (8, 32)},
    "block_q": {
        f"block_q_{size}": (vary(DEFAULT, **{"select.block_q": size}), f"the first of {size} tokens chooses for all")
        for size in (4, 16)
    },
    "sharing": {
        "sharing_all": (vary(DEFAULT, **{"select.sharing": "all"}), "both heads choose together"),
        "sharing_group": (
            Grouped(
                num_attention_heads=2, num_key_value_heads=1, head_dim=32, select=vary(DEFAULT.select, sharing="group")
            ),
            "both heads share keys and values, and choose together",
        ),
    },
    "rotated": {
        "rotated_false": (vary(DEFAULT, **{"select.rotated": False}), "queries and keys compared before rotation")
    },
    "search": {
        "search_beam": (MEANS, "a tree of means, walked down by a beam; nothing is learnt"),
        "search_flat": (
            vary(DEFAULT, select=Blocks(k=SEEN, block_q=1, block_k=BLOCK)),
            "the mean of every block, no tree",
        ),
    },
    "learns": {
        f"learns_{way}": (vary(MEANS, **{"select.learns": way}), f"as search_beam, {words}")
        for way, words in {
            "branch": "and a branch with a gate attends to the mean of every block",
            "distilled": "and scores learn to follow attention's own mass",
            "gated": "and a block's weight is multiplied by 2 sigmoid(score)",
            "entmax": "and a block's weight is multiplied by the entmax of the scores",
        }.items()
    },
}
ARMS: Mapping[str, tuple[Attention, str]] = {
    "default": (DEFAULT, "a tree of bounds; each head chooses for each token"),
    **{name: arm for arms in AXES.values() for name, arm in arms.items()},
}
BESIDE: Mapping[str, str] = {"learns": "search_beam"}  # what the arms of an axis differ from, where not the default


def configured(arm: str, *, length: int, steps: int) -> Config:
    """The run of an arm."""
    there = configured_there("best_first", length=length, steps=steps)
    return vary(there, **{"model.attention": ARMS[arm][0]})


def cells(profile: Profile) -> tuple[Cell, ...]:
    """A cell per seed, task and arm; no time is measured."""
    if profile == "quick":
        arms, seeds = ("default", "search_beam", "learns_gated"), range(SEEDS["quick"])
        return grid(arms=arms, seeds=seeds, seconds=10, timed=False, task=("recall",), length=(256,), steps=(12,))
    every = [
        grid(arms=ARMS, seeds=(seed,), seconds=120, timed=False, task=(task,), length=(LENGTH,), steps=(STEPS[task],))
        for seed in range(SEEDS[profile])
        for task in TASKS
    ]
    return sum(every, ())


def measure(cell: Cell) -> list[Reading]:
    """One training of one arm on one task."""
    assert cell.arm is not None, "each arm trains in a cell of its own"
    return trained(cell, configured(cell.arm, length=int(cell.axes["length"]), steps=int(cell.axes["steps"])))


def answer(records: Sequence[Record]) -> str:
    """Task by task the default's accuracy, and of each axis the arm that differs most from what it is held against."""
    sentences = []
    for task in TASKS:
        at = _longest(records, task)
        if at is None:
            continue
        with suppress(NoEvidence):
            found = estimate(records, arm="default", metric="accuracy", **at).map(lambda share: 100 * share)
            sentences.append(f"On {task} the default answers {found} percent; in points, {_most(records, at)}.")
    if not sentences:
        raise NoEvidence("the default has been trained on no task")
    return (
        f"{' '.join(sentences)} Of each axis the largest difference is named, with an interval that is not widened for "
        "it; the tables have all. Ways to learn are held against the tree of means that learns nothing."
    )


def _most(records: Sequence[Record], at: Mapping[str, Value]) -> str:
    said = []
    for axis, arms in AXES.items():
        changed: dict[str, Estimate] = {}
        for arm in arms:
            with suppress(NoEvidence):
                beside = BESIDE.get(axis, "default")
                gap = compare(records, arm=arm, baseline=beside, metric="accuracy", ratio=False, **at)
                changed[arm] = gap.map(lambda difference: 100 * difference)
        if changed:
            most = max(changed, key=lambda arm: abs(changed[arm].value))
            said.append(f"{most} {changed[most]}")
    if not said:
        raise NoEvidence("no arm has been trained beside the default")
    return ", ".join(said)


def _longest(records: Sequence[Record], task: str) -> dict[str, Value] | None:
    """The longest training that the default has on a task."""
    there = [
        row.axes
        for row in records
        if (row.arm, row.metric, row.error) == ("default", "accuracy", None) and row.axes["task"] == task
    ]
    longest = max(there, key=lambda axes: int(axes["steps"]), default=None)
    return None if longest is None else {name: longest[name] for name in ("task", "length", "steps")}


def _free(arm: str) -> int:
    """The blocks that an arm's last query chooses: of those before its own that it sees all but the first and last."""
    select = ARMS[arm][0].select
    assert isinstance(select, Blocks), "every arm sees blocks"
    return select.past(LENGTH // select.block_k) - 2


STUDY = Study(
    name="attention_axes",
    question="Which single choice of sparse attention decides what it finds?",
    arms=tuple(Arm(name, words) for name, (_, words) in ARMS.items()),
    baseline="default",
    metrics=("accuracy", "steps_to_criterion", "selection_share"),
    seeds=SEEDS,
    cells=cells,
    measure=measure,
    compared=tuple(
        Compared(
            "accuracy",
            margin=MARGIN,
            why="that of attention_quality",
            where={"task": task},
            arms=tuple(arm for axis, arms in AXES.items() if BESIDE.get(axis, "default") == beside for arm in arms),
            baseline=beside,
        )
        for task in TASKS
        for beside in dict.fromkeys(("default", *BESIDE.values()))
    ),
    configs={arm: configured(arm, length=LENGTH, steps=STEPS["recall"]) for arm in ARMS},
    figures=tuple(
        Figure(
            f"{metric}_{task}",
            f"{words} on {task}, by axis",
            metric=metric,
            kind="interval",
            where={"task": task},
            reference=(LEARNT, "learnt: 99%") if metric == "accuracy" else None,
        )
        for metric, words in (("accuracy", "Held-out accuracy"), ("steps_to_criterion", "Steps until 99%"))
        for task in TASKS
    ),
    answer=answer,
    limits=(
        "Exploratory: one factor changed at a time around one default, so that what two choices do together is unseen.",
        "A model of two layers and two heads of 32, with a causal convolution of three tokens before attention.",
        "One learning rate for all arms, chosen with dense attention; a loss of distillation has weight 1.",
        "Blocks of other lengths make another tree: of as many levels more or fewer as their number has halvings.",
        "The first block, the previous one and a query's own are seen by all. How many are left to choose differs: "
        + ", ".join(f"{_free(arm)} in {arm}" for arm in ("default", *AXES["block_k"], *AXES["k"], *AXES["block_q"]))
        + "; what long blocks cost is also what a single choice costs.",
        "Where trainings of an arm either succeed or fail, their mean is neither: the records have each seed.",
        "Two heads that share keys and values have fewer weights than two that do not.",
    ),
)
