"""What one module of multi-token prediction does to the main head when each arm has the learning rate that suits it.

`multi_token` trains its arms at one rate, which may suit the arm without modules better: their loss adds to every
gradient. Here each arm chooses among three rates, by the validation text and on seeds of its own, anew for every seed
of the results, so that the spread over seeds holds that of tuning. Not part of the report, since it takes four
trainings where `multi_token` takes one: `python -m ablations run ablations/multi_token_tuned.py --profile full`.
"""

from collections.abc import Mapping

from ablations.comparison import Compared
from ablations.study import Arm, Cell, Profile, Reading, Study, grid
from ablations.tuning import Tuning, readings, result, trained, tune
from bench.measurement import Measurement
from dsv3.config import MTP, Config, digest, presets, vary

SEEDS: Mapping[Profile, int] = {"quick": 2, "full": 6}
RATES = (1e-3, 3e-3, 1e-2)
FIRST_TUNING_SEED = 1000
LENGTH = 128


def base(depth: int) -> Config:
    """The tiny model with that many modules."""
    mtp = MTP(num_nextn_predict_layers=depth) if depth else None
    return vary(presets.tiny(), **{"model.mtp": mtp, "train.sequence_length": LENGTH})


CONFIGS: Mapping[str, Config] = {"none": base(0), "one": base(1)}


def cells(profile: Profile) -> tuple[Cell, ...]:
    """Per seed and arm a cell: a training for each rate, and one for the result."""
    steps, tokens, seconds = {"quick": (24, 512, 32), "full": (120, 2048, 280)}[profile]
    axes = {"steps": (steps,), "tokens": (tokens,)}
    return grid(arms=CONFIGS, seeds=range(SEEDS[profile]), seconds=seconds, timed=False, **axes)


def sized(arm: str, cell: Cell) -> Config:
    """An arm's config at the cell's number of steps and tokens."""
    rows = int(cell.axes["tokens"]) // LENGTH
    return vary(CONFIGS[arm], **{"train.steps": cell.axes["steps"], "train.batch_size": rows})


def measure(cell: Cell) -> list[Reading]:
    """The whole grid on the validation text, and the tuned arm on the test text."""
    assert cell.arm is not None, "each arm is tuned in a cell of its own"
    assert cell.seed is not None, "every cell of this study has a seed"
    tuning = Tuning(field="train.optimizer.lr", values=RATES, seeds=(FIRST_TUNING_SEED + cell.seed,))
    arms = {cell.arm: sized(cell.arm, cell)}
    tuned = tune(tuning, arms, result_seeds=range(SEEDS["full"]), trial=trained)[cell.arm]
    found = Measurement(metric="bits_per_byte", value=result(tuned, cell.seed, trained))
    tested = Reading(arm=cell.arm, measurement=found, axes={"text": "test"}, config=digest(tuned.config))
    return [tested, *readings(tuned, "bits_per_byte")]


STUDY = Study(
    name="multi_token_tuned",
    question="Does the main head gain from multi-token prediction when each arm has its own learning rate?",
    arms=(
        Arm("none", "the next token only", CONFIGS["none"]),
        Arm("one", "one module: also the token after the next, loss weight 0.3", CONFIGS["one"]),
    ),
    baseline="none",
    metrics=("bits_per_byte", "flops"),
    seeds=SEEDS,
    cells=cells,
    measure=measure,
    configs={arm: sized(arm, cells("full")[0]) for arm in CONFIGS},
    compared=(Compared("bits_per_byte", margin=0.01, why="that of multi_token", where={"text": "test"}),),
    limits=("Three rates: where the first or the last of them is the best, the optimum may lie beyond.",),
)
