"""Does a model that sees few keys still find what it needs? Tasks of recall, each arm trained from the same weights.

A task tells, waits and asks (`bench.recall_tasks`); a small model of two layers is trained on it until dense attention
answers 99% (`bench.recall_training`). All sparse arms see as many keys per query, an eighth of the row, which is less
than a quarter of what causality leaves; blocks are so many that a tree prunes at least two of its levels:

    length / block_k  >=  k branching^2        128 blocks, k = 16 of them seen, 2 children a node

Blocks are small, 4 keys in rows of 512, since a mean over many keys hides the one that is asked for: in the trials
made, a model that was trained densely and then given a choice found the less the longer the blocks were, and found it
in longer ones by bounds than by means. So there are two trees, `hierarchical` of means and `best_first` of bounds. Keys
are chosen for each token (block_q = 1) on every task. The window is the control: it does not reach from a question to
what was told, in two layers either, so that where it succeeds the task does not ask for recall. Counting needs all keys
at once, which no choice of an eighth has: named here, before any run, as the one task on which sparse arms may lose.

Not part of the report, since all seeds take hours: `python -m ablations run ablations/attention_quality.py --profile
full`, in as many sittings as it takes, since finished cells are kept.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress

from ablations.comparison import Compared
from ablations.evidence import Estimate, NoEvidence, compare, estimate
from ablations.study import Arm, Cell, Figure, Profile, Reading, Study, Value, grid
from bench.measurement import Measurement
from bench.recall_tasks import ROWS as TASKS
from bench.recall_tasks import VOCABULARY, Task
from bench.record import Record
from dsv3.config import (
    AdamW,
    Attention,
    Blocks,
    Config,
    Everything,
    Hierarchical,
    Indexer,
    Latent,
    Model,
    MultiHead,
    PerHead,
    Rope,
    Schedule,
    Select,
    Train,
    Window,
    digest,
)

SEEDS: Mapping[Profile, int] = {"quick": 2, "full": 8}
EXEMPT = ("counting",)
STEPS: Mapping[str, int] = dict.fromkeys(TASKS, 600) | {"induction": 1000}
LENGTH = 512
BATCH = 4
BLOCKS, SEEN, BRANCHING = 128, 16, 2  # blocks of a row, how many of them a query sees, children of a node
LOOK_EVERY, HELD_OUT = 20, 16
LEARNT, MARGIN = 0.99, 0.01
CHANGES: Mapping[str, str] = {
    "dense": "every visible key",
    "window": "the last keys: the control, which must fail",
    "per_head": "the article's choice: the keys that a linear map of x finds most important, for each head",
    "blocks": "blocks of keys whose mean key scores highest, of all",
    "hierarchical": "blocks of keys found down a tree of means",
    "best_first": "the blocks of the largest bound, found down a tree of bounds",
    "indexer": "the keys that a lightning indexer scores highest, on latent attention",
}
ASKED: Mapping[str, str] = {  # of whom it is asked whether they lose anything
    "best_first": "down a tree of bounds",
    "hierarchical": "down a tree of means",
    "blocks": "by the means of all blocks",
    "indexer": "by an indexer with latent attention",
    "per_head": "by the article's importance of keys",
}
MOST = 0.05  # that any may lose


def selects(length: int) -> dict[str, Select]:
    """What each arm sees of rows of that length."""
    block = length // BLOCKS
    keys = SEEN * block
    return {
        "dense": Everything(),
        "window": Window(size=keys),
        "per_head": PerHead(k=keys),
        "blocks": Blocks(k=SEEN, block_q=1, block_k=block),
        "hierarchical": Hierarchical(k=SEEN, block_q=1, block_k=block, branching=BRANCHING),
        "best_first": Hierarchical(k=SEEN, block_q=1, block_k=block, branching=BRANCHING, search="best_first"),
        "indexer": Indexer(index_n_heads=4, index_head_dim=32, index_topk=keys),
    }


def attention(arm: str, length: int) -> Attention:
    """One head of 64; an indexer comes with latent attention, here with latents as wide as the head."""
    select = selects(length)[arm]
    if not isinstance(select, Indexer):
        return MultiHead(num_attention_heads=1, head_dim=64, select=select)
    return Latent(
        num_attention_heads=1,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_nope_head_dim=48,
        qk_rope_head_dim=16,
        v_head_dim=64,
        select=select,
    )


def configured(arm: str, *, length: int, steps: int) -> Config:
    """The run of an arm. The base of the rotary embedding is large: tasks match content at any distance."""
    model = Model(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=128,
        attention=attention(arm, length),
        rope=Rope(theta=1e6),
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.1,
        embedding_range=0.15,
    )
    train = Train(
        steps=steps,
        batch_size=BATCH,
        sequence_length=length,
        optimizer=AdamW(lr=5e-3, weight_decay=0.0),
        schedule=Schedule(warmup=0.05),
    )
    return Config(model=model, train=train)


def cells(profile: Profile) -> tuple[Cell, ...]:
    """A cell per seed, task and arm; no time is measured."""
    if profile == "quick":
        arms, seeds = ("dense", "best_first"), range(SEEDS["quick"])
        return grid(arms=arms, seeds=seeds, seconds=10, timed=False, task=("recall",), length=(256,), steps=(12,))
    every = [
        grid(arms=CHANGES, seeds=(seed,), seconds=120, timed=False, task=(task,), length=(LENGTH,), steps=(steps,))
        for seed in range(SEEDS[profile])
        for task, steps in STEPS.items()
    ]
    return sum(every, ())


def measure(cell: Cell) -> list[Reading]:
    """One training of one arm on one task."""
    assert cell.arm is not None, "each arm trains in a cell of its own"
    return trained(cell, configured(cell.arm, length=int(cell.axes["length"]), steps=int(cell.axes["steps"])))


def trained(cell: Cell, config: Config) -> list[Reading]:
    """What the cell's training of that config came to."""
    import torch

    from bench.recall_training import learn

    assert cell.arm is not None, "each arm trains in a cell of its own"
    assert cell.seed is not None, "every cell of this study has a seed"
    torch.set_num_threads(1)  # sums have one order whatever the cores
    length, steps = int(cell.axes["length"]), int(cell.axes["steps"])
    task = Task(name=str(cell.axes["task"]), length=length, block=length // BLOCKS)
    try:
        learnt = learn(config, task, cell.seed, look_every=LOOK_EVERY, held_out=HELD_OUT)
    except FloatingPointError as diverged:
        return [Reading(arm=cell.arm, metric="accuracy", failed=str(diverged))]
    found = {
        "accuracy": learnt.accuracy,
        "steps_to_criterion": steps if learnt.reached is None else learnt.reached,
        "selection_share": learnt.share,
    }
    return [
        Reading(arm=cell.arm, measurement=Measurement(metric=metric, value=value), config=digest(config))
        for metric, value in found.items()
    ]


def answer(records: Sequence[Record]) -> str:
    """What was asked and is not shown; then what each way to choose loses against dense attention, task by task."""
    points = _points(records)
    share = estimate(records, arm="best_first", metric="selection_share", **points[0])
    lost = {words: found for arm, words in ASKED.items() if (found := _lost(records, arm, points))}
    return (
        f"{_unlearnt(records, points)}{_missed(lost)}With {_percent(share)} of the visible pairs, chosen for each "
        f"token, accuracy falls short of dense attention's by these points. {' '.join(_losses(lost))}"
    )


def _unlearnt(records: Sequence[Record], points: Sequence[Mapping[str, Value]]) -> str:
    """On which tasks dense attention itself has not learnt what was asked of it."""
    dense = {str(at["task"]): estimate(records, arm="dense", metric="accuracy", **at) for at in points}
    short = [f"{task} ({_percent(found)})" for task, found in dense.items() if found.value < LEARNT]
    return f"Dense attention itself stays below {LEARNT:.0%} on {', '.join(short)}. " if short else ""


def _lost(records: Sequence[Record], arm: str, points: Sequence[Mapping[str, Value]]) -> dict[str, Estimate]:
    """By task the percentage points that the arm loses against dense attention."""
    lost: dict[str, Estimate] = {}
    for at in points:
        with suppress(NoEvidence):
            lost[str(at["task"])] = _points_lost(records, arm, at)
    return lost


def _missed(lost: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Of whom it is not shown that they lose no more than they may, and on which tasks."""
    said = []
    for most, apart in ((MARGIN, EXEMPT), (MOST, ())):
        short = []
        for words, by_task in lost.items():
            tasks = [task for task, points in by_task.items() if task not in apart and not _below(points, most)]
            short += [f"{words} on {', '.join(tasks)}"] if tasks else []
        beside = f" beside {', '.join(apart)}" if apart else ""
        said += [f"to lose less than {most:.0%}{beside} ({'; '.join(short)})"] if short else []
    return f"Asked, and not shown: {'; '.join(said)}. " if said else ""


def _below(points: Estimate, most: float) -> bool:
    return points.high is not None and points.high < 100 * most


def _losses(lost: Mapping[str, Mapping[str, Estimate]]) -> list[str]:
    """A sentence per way to choose, the one that loses most on its worst task first; exempt tasks do not count."""
    said: list[tuple[float, str]] = []
    for words, by_task in lost.items():
        counted = [task for task in by_task if task not in EXEMPT] or list(by_task)
        worst = max(counted, key=lambda task: by_task[task].value)
        listed = ", ".join(f"{task} {found}" for task, found in by_task.items())
        said.append((by_task[worst].value, f"{words[0].upper()}{words[1:]}: {listed}; the most on {worst}."))
    return [sentence for _, sentence in sorted(said, reverse=True)]


def _points(records: Sequence[Record]) -> list[dict[str, Value]]:
    """Per task the longest training that dense attention and the tree of bounds both have."""
    found: dict[str, dict[str, Value]] = {}
    trained = {
        arm: [row.axes for row in records if (row.arm, row.metric, row.error) == (arm, "accuracy", None)]
        for arm in ("dense", "best_first")
    }
    for axes in sorted(trained["best_first"], key=lambda axes: int(axes["steps"])):
        if axes in trained["dense"]:
            found[str(axes["task"])] = {name: axes[name] for name in ("task", "length", "steps")}
    if not found:
        raise NoEvidence("dense attention and a tree of bounds have not both been trained on a task")
    return [found[task] for task in TASKS if task in found]


def _points_lost(records: Sequence[Record], arm: str, at: Mapping[str, Value]) -> Estimate:
    """Dense minus the arm, in percentage points."""
    gap = compare(records, arm=arm, baseline="dense", metric="accuracy", ratio=False, **at)
    return gap.map(lambda difference: -100 * difference)


def _percent(found: Estimate) -> str:
    return f"{100 * found.value:.3g}%"


STUDY = Study(
    name="attention_quality",
    question="Does sparse attention find what dense attention finds?",
    arms=tuple(Arm(name, changes) for name, changes in CHANGES.items()),
    baseline="dense",
    metrics=("accuracy", "steps_to_criterion", "selection_share"),
    seeds=SEEDS,
    cells=cells,
    measure=measure,
    compared=tuple(
        Compared(
            "accuracy",
            margin=MARGIN,
            why="one answer in a hundred: what dense attention itself may miss of a task that counts as learnt",
            where={"task": task},
        )
        for task in TASKS
        if task not in EXEMPT
    ),
    configs={arm: configured(arm, length=LENGTH, steps=STEPS["recall"]) for arm in CHANGES},
    figures=(
        *(
            Figure(
                f"accuracy_{task}",
                f"Held-out accuracy on {task}" + (", where sparse arms may lose" if task in EXEMPT else ""),
                metric="accuracy",
                kind="interval",
                where={"task": task},
                reference=(LEARNT, "learnt: 99%"),
            )
            for task in TASKS
        ),
        Figure(
            "steps_to_criterion",
            "Steps until validation rows are answered at 99%; all steps where they never were",
            metric="steps_to_criterion",
            kind="interval",
        ),
    ),
    answer=answer,
    limits=(
        "A model of two layers and one head of 64, with a causal convolution of three tokens before attention.",
        "One learning rate for all arms, chosen with dense attention.",
        "The indexer comes with latent attention, the others with multi-head attention: it differs in both.",
        "Counting is exempt: a choice of an eighth of the keys does not see what there is to count.",
        "Tracking has its chain written out as it is answered: each hop is asked for on its own.",
    ),
)
