"""What latent attention (MLA) saves in the cache, what it costs in decoding, and how well it models.

Three looks. Size: bytes of cache per token by arithmetic, checked against buffers that are really allocated, for the
tiny model and at DeepSeek-V3's size, where the other forms keep its 128 heads of width 128. Training: the tiny model
with each form, same text, seeds and tokens; head widths are set so that all have the same number of parameters within
1%. Decoding: one token of one layer (`bench.decoding`) after a cache, all forms interleaved in one process.

MLA decodes in its absorbed form, in which queries meet the cached latents themselves; `latent_expanded` makes every key
and value anew for each token, and is what absorbing saves.
"""

from collections.abc import Callable, Mapping, Sequence

from ablations.claims import Claim, Verdict
from ablations.comparison import Compared
from ablations.evidence import Estimate, NoEvidence, compare, decide, estimate
from ablations.study import Arm, Cell, Figure, Reading, Rule, Study, grid
from bench.measurement import Measurement
from bench.record import Profile, Record
from dsv3.config import Attention, Config, Grouped, Model, MultiHead, digest, presets, vary
from dsv3.model.cost import kv_bytes_per_token, parameters

SEEDS: Mapping[Profile, int] = {"quick": 2, "full": 6}
TRAINING: Mapping[Profile, tuple[int, int, float]] = {"quick": (16, 512, 5), "full": (120, 2048, 60)}
TRAINED: Mapping[Profile, tuple[str, ...]] = {
    "quick": ("multi_head", "latent"),
    "full": ("multi_head", "grouped", "single", "latent"),
}
LENGTHS: Mapping[Profile, tuple[int, ...]] = {"quick": (1024, 2048), "full": (1024, 4096, 16384)}
LENGTH = 128
BLOCKS, CALLS = 5, 5

FORMS: Mapping[str, Attention] = {
    "multi_head": MultiHead(num_attention_heads=4, head_dim=32),
    "grouped": Grouped(num_attention_heads=4, num_key_value_heads=2, head_dim=40),
    "single": Grouped(num_attention_heads=4, num_key_value_heads=1, head_dim=48),
    "latent": presets.tiny().model.attention,
}
V3_FORMS: Mapping[str, Attention] = {
    "multi_head": MultiHead(num_attention_heads=128, head_dim=128),
    "grouped": Grouped(num_attention_heads=128, num_key_value_heads=8, head_dim=128),
    "single": Grouped(num_attention_heads=128, num_key_value_heads=1, head_dim=128),
    "latent": presets.deepseek_v3().model.attention,
}


SIZES = ("tiny", "deepseek_v3")


def cells(profile: Profile) -> tuple[Cell, ...]:
    """Sizes once; per seed a training for each form, and one decoding of all forms per length."""
    steps, tokens, seconds = TRAINING[profile]
    seeds, arms = range(SEEDS[profile]), TRAINED[profile]
    training = grid(
        seeds=seeds, seconds=seconds, timed=False, arms=arms, look=("training",), steps=(steps,), tokens=(tokens,)
    )
    decoding = [
        cell
        for length in LENGTHS[profile]
        for cell in grid(seeds=seeds, seconds=8 + length / 500, look=("decoding",), length=(length,))
    ]
    return *grid(seconds=4, timed=False, look=("size",)), *training, *decoding


def measure(cell: Cell) -> list[Reading]:
    """The look that the cell asks for."""
    return {"size": _size, "training": _training, "decoding": _decoding}[str(cell.axes["look"])](cell)


def configured(arm: str, *, tokens: int, steps: int) -> Config:
    """The training run of a form: tiny with that attention, without multi-token prediction."""
    return vary(
        presets.tiny(),
        **{
            "model.attention": FORMS[arm],
            "model.mtp": None,
            "train.steps": steps,
            "train.batch_size": tokens // LENGTH,
            "train.sequence_length": LENGTH,
        },
    )


def _size(cell: Cell) -> list[Reading]:
    """Bytes of cache in bf16 and parameters, of the tiny model and at DeepSeek-V3's size."""
    import torch

    from dsv3.attention import KeyValueCache

    tiny, v3 = configured("latent", tokens=LENGTH, steps=1).model, vary(presets.deepseek_v3().model, mtp=None)
    readings = []
    for name, base, forms in zip(SIZES, (tiny, v3), (FORMS, V3_FORMS), strict=True):
        for arm, attention in forms.items():
            model: Model = vary(base, attention=attention)
            cached = kv_bytes_per_token(model)
            with torch.device("meta"):
                held = KeyValueCache.empty(model, 1, 7, torch.bfloat16, "meta").nbytes
            assert held == 7 * cached, f"{arm}: the cache holds {held} bytes of 7 tokens, the formula says {7 * cached}"
            for metric, value in (("kv_bytes_per_token", cached), ("parameters", parameters(model))):
                found = Measurement(metric=metric, value=value)
                readings.append(Reading(arm=arm, measurement=found, axes={"model": name}, config=digest(model)))
    return readings


def _training(cell: Cell) -> list[Reading]:
    """Held-out bits per byte of the trained model; one thread, so that sums have one order whatever the cores."""
    import torch

    from bench.training import sick_steps, train
    from dsv3.data.prepare import prepare
    from dsv3.train import TrainState
    from dsv3.train.evaluate import HeldOut, evaluate

    assert cell.arm is not None, "each form trains in a cell of its own"
    assert cell.seed is not None, "every training has a seed"
    torch.set_num_threads(1)
    config = configured(cell.arm, tokens=int(cell.axes["tokens"]), steps=int(cell.axes["steps"]))
    prepared = prepare(config.data, config.model.vocab_size)
    state = TrainState.create(config, seed=cell.seed, device=cell.device)
    if sick := sick_steps(train(state, prepared, cell.seed)):
        return [Reading(arm=cell.arm, metric="bits_per_byte", failed=sick)]
    heldout = HeldOut.of(prepared, prepared.test, length=LENGTH, count=config.train.eval_sequences)
    tested = evaluate(state.model, heldout, step=state.step, batch_size=16, precision=config.train.precision)
    found = Measurement(metric="bits_per_byte", value=tested.bits_per_byte)
    return [Reading(arm=cell.arm, measurement=found, config=digest(config), corpus=prepared.digest)]


def _decoding(cell: Cell) -> list[Reading]:
    """One token of one layer after `length` - 1 others: times of all forms that equal their whole forward pass."""
    import torch

    from bench import decoding
    from bench.meters.paired import process_clock, summary, time_block

    torch.set_num_threads(1)
    length = int(cell.axes["length"])
    arms: dict[str, Callable[[], object]] = {}
    readings = []
    for form in decoding.FORMS:
        try:
            decoding.check(form, cell.device)
            arms[form] = decoding.layer(form, length, cell.device).decode
        except AssertionError as error:
            readings.append(Reading(arm=form, metric="decode_cpu_ratio", failed=str(error)))
    time_block(arms, 0, 1, process_clock)  # warms up
    blocks = [time_block(arms, block, CALLS, process_clock) for block in range(BLOCKS)]
    for form in arms:
        rows = summary(blocks, form, "multi_head", "decode", ("cpu",))
        readings += [Reading(arm=form, measurement=row) for row in rows]
    return readings


def caches_less_and_models_no_worse(claim: Claim, records: Sequence[Record]) -> Verdict:
    """DS1: held-out bits per byte against multi-head attention, same seeds; the words set bytes of cache beside it."""
    assert claim.margin is not None, "the claim says how far above zero still counts"
    gap = _gap(records, "latent")
    less, there = (_bytes(records, "multi_head", model) / _bytes(records, "latent", model) for model in SIZES)
    words = (
        f"At equal parameters its held-out text takes {_signed(gap)} bit/byte more than multi-head attention's, with "
        f"{less:.1f} times fewer bytes of cache ({there:.0f} times at DeepSeek-V3's size)."
    )
    return decide(gap, words, at_most=claim.margin)


def answer(records: Sequence[Record]) -> str:
    """Bytes at DeepSeek-V3's size, decoding at the longest cache, and what modelling costs."""
    size = {arm: _bytes(records, arm, "deepseek_v3") for arm in FORMS}
    length = max(int(row.axes["length"]) for row in records if row.metric == "decode_cpu_ratio")
    time = {arm: _decode(records, arm, length) for arm in (*list(FORMS)[1:], "latent_expanded")}
    gaps = ", ".join(f"{arm} {_signed(_gap(records, arm))}" for arm in FORMS if _trained(records, arm))
    return (
        f"At DeepSeek-V3's size MLA caches {size['latent']:,.0f} bytes per token in bf16, multi-head attention "
        f"{size['multi_head']:,.0f}, groups of 16 heads {size['grouped']:,.0f} and a single key {size['single']:,.0f}. "
        f"After {length} tokens one layer decodes a token in {time['latent']} of multi-head attention's time (groups "
        f"of 4 heads {time['grouped']}, one key {time['single']}; MLA without absorbing {time['latent_expanded']}). "
        f"Held-out bits per byte of the tiny model minus multi-head's, lower is better: {gaps}."
    )


def _gap(records: Sequence[Record], arm: str) -> Estimate:
    """At the longest training that was run."""
    steps = [int(row.axes["steps"]) for row in records if "steps" in row.axes]
    if not steps:
        raise NoEvidence("no form is trained yet")
    return compare(records, arm=arm, baseline="multi_head", metric="bits_per_byte", steps=max(steps))


def _trained(records: Sequence[Record], arm: str) -> bool:
    return arm != "multi_head" and any((row.arm, row.metric) == (arm, "bits_per_byte") for row in records)


def _bytes(records: Sequence[Record], arm: str, model: str) -> float:
    return estimate(records, arm=arm, metric="kv_bytes_per_token", model=model).value


def _decode(records: Sequence[Record], arm: str, length: int) -> Estimate:
    return estimate(records, arm=arm, metric="decode_cpu_ratio", length=length)


def _signed(found: Estimate) -> str:
    interval = "no interval" if found.low is None or found.high is None else f"{found.low:+.4f} to {found.high:+.4f}"
    return f"{found.value:+.4f} ({interval}, n={found.n})"


STUDY = Study(
    name="latent_attention",
    question="What does latent attention save in the cache, and what does that cost in decoding and in quality?",
    arms=(
        Arm("multi_head", "a key and a value per head"),
        Arm("grouped", "a key and a value per group of heads: 2 when trained, 4 when timed, 16 at DeepSeek-V3's size"),
        Arm("single", "one key and value for all heads"),
        Arm("latent", "MLA: one latent and one rotary key for all heads, decoding absorbed"),
        Arm("latent_expanded", "MLA that makes every key and value anew for each token; differs in decoding only"),
    ),
    baseline="multi_head",
    metrics=("kv_bytes_per_token", "decode_cpu_ratio", "bits_per_byte", "cpu_seconds", "parameters"),
    seeds=SEEDS,
    cells=cells,
    measure=measure,
    rules=(Rule("DS1", seeds=6, judge=caches_less_and_models_no_worse),),
    figures=(
        Figure(
            "cache",
            "Bytes of cache per token at DeepSeek-V3's size, bf16, all layers",
            metric="kv_bytes_per_token",
            kind="interval",
            where={"model": "deepseek_v3"},
            log="x",
        ),
        Figure(
            "decoding",
            "Time to decode one token of one layer against multi-head attention, one thread",
            metric="decode_cpu_ratio",
            x="length",
            log="xy",
        ),
        Figure(
            "bits_per_byte",
            "Held-out bits per byte of the tiny model minus multi-head attention's, same seed",
            metric="bits_per_byte",
            kind="interval",
            against_baseline=True,
        ),
    ),
    answer=answer,
    compared=(
        Compared(
            "bits_per_byte",
            margin=0.01,
            why="the margin of claim DS1",
            where={"look": "training"},
            arms=tuple(FORMS)[1:],
        ),
    ),
    configs={arm: configured(arm, tokens=2048, steps=120) for arm in FORMS},
    limits=(
        "The tiny model is trained for minutes: an order among forms here need not be that of large models.",
        "Parameters are equal within 1%, FLOPs are not: MLA's low-rank products and a shared key cost different work.",
        "Decoding is timed for one sequence on a CPU, where weights are read as often as the cache; a GPU that serves "
        "many sequences reads the cache far more, which favours small ones.",
        "MLA at equal cache rather than equal parameters is not asked.",
    ),
)
