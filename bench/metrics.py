"""Every metric that dsv3 reports, as data: what it means, which way is better, how noisy it is and how it misleads.

noise      exact     equal on every run: gated by equality, both ways
           paired    arms interleaved in one process or paired by seed: an interval, and perhaps "not enough evidence"
           absolute  a figure of this machine at this hour: shown, never gated
transfers  whether the figure holds on other hardware (counts, numerics) or belongs to this machine (times)
bias       how the figure errs even when measured as described

To add a metric, add a row in alphabetical order and run `python -m bench.glossary`, which writes it to bench/README.md.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from bench.record import Noise


@dataclass(frozen=True)
class Metric:
    """One row of the glossary."""

    name: str
    unit: str
    better: Literal["lower", "higher", "none"]
    noise: Noise
    transfers: bool
    formula: str
    bias: str
    signed: bool = False  # whether it can be negative


_CPU_RATIO = "reads below a parallel speed-up; includes cache misses caused by the other arms of the block"
_WALL_RATIO = "on a busy machine the wait for a core counts too; differences under about 10% are rarely decided"
_ONE_RUN = "one seed's spread is often larger than the effect asked about"
_THIS_HOUR = "moves with load, clocks and neighbours; compare within one process only"

# fmt: off
METRICS: tuple[Metric, ...] = (
    Metric("accuracy", "share", "higher", "absolute", transfers=True,
           formula="labelled positions of held-out rows where the likeliest token is the label / all of them",
           bias=_ONE_RUN),
    Metric("active_parameters", "parameters", "none", "exact", transfers=True,
           formula="parameters that one token multiplies with",
           bias="embedding rows are counted whole though a token reads one"),
    Metric("allocations", "allocations", "lower", "exact", transfers=True,
           formula="blocks of tensor memory taken during the step",
           bias="blocks reused by an allocator's cache count as taken again; memory outside tensors is not seen"),
    Metric("attention_mass", "share", "higher", "absolute", transfers=True,
           formula="softmax weight of dense attention on the chosen blocks / on the blocks that could be chosen, or on "
                   "all keys",
           bias="weight is not use: what attention spreads thinly over many keys counts like what it is sure of"),
    Metric("backward_flops", "FLOP", "lower", "exact", transfers=True,
           formula="floating-point operations of backward: 2 m n k per matrix product",
           bias="matrix products and attention only; element-wise work is left out"),
    Metric("bits_per_byte", "bit/byte", "lower", "absolute", transfers=True,
           formula="cross-entropy of the held-out text in bits / its length in UTF-8 bytes",
           bias=_ONE_RUN),
    Metric("bits_per_byte_gap", "bit/byte", "lower", "paired", transfers=True, signed=True,
           formula="bits per byte of the arm - of the baseline, same seed and text",
           bias="same seed does not mean same initial weights where shapes differ"),
    Metric("bubble_share", "share", "lower", "exact", transfers=True,
           formula="idle rank-time / (ranks x time from first start to last end of a step)",
           bias="charges ranks for waiting before their first and after their last action, where steps may overlap"),
    Metric("bubble_share_span", "share", "lower", "exact", transfers=True,
           formula="idle time between a rank's own first and last action / that span, mean over ranks",
           bias="hides the start-up and drain of a pipeline"),
    Metric("bubble_share_steady", "share", "lower", "exact", transfers=True,
           formula="1 - busy time / period, when steps follow each other without a flush between them",
           bias="true only if nothing (gradient clipping, logging) waits for all ranks between steps"),
    Metric("bubble_slots", "slots", "lower", "exact", transfers=True,
           formula="idle slots of all ranks between the step's first start and last end",
           bias="counted in units of one forward; real actions do not last whole units"),
    Metric("bubble_slots_formula", "slots", "lower", "exact", transfers=True,
           formula="idle slots of all ranks by the closed form of the schedule's paper",
           bias="a form of equal stages; stands beside the simulated slots and must equal them"),
    Metric("bubble_to_ideal", "share", "lower", "exact", transfers=True,
           formula="idle rank-time / rank-time of the work itself: (p - 1) / m for 1F1B",
           bias="larger than bubble_share for the same schedule, and not bounded by 1; papers mix the two"),
    Metric("card_hours", "h", "lower", "exact", transfers=True,
           formula="tokens x FLOPs per token / (peak x utilisation): hours that one card would take",
           bias="arithmetic on a utilisation that is assumed"),
    Metric("ceiling_share", "share", "higher", "absolute", transfers=False,
           formula="operations per second of the call / gemm_flops_per_second, same format and threads, same process",
           bias="the ceiling is the fastest of ten products: a share above 1 means that all ten were disturbed"),
    Metric("compile_seconds", "s", "lower", "absolute", transfers=False,
           formula="time of the first call of a compiled step - of a later call",
           bias="an on-disk cache of compiled code shortens it"),
    Metric("copy_bytes_per_second", "B/s", "higher", "absolute", transfers=False,
           formula="2 x bytes of a large copy / its fastest time: read once, written once",
           bias="a processor that reads a line before it writes it moves half as much again, uncounted"),
    Metric("cpu_seconds", "s", "lower", "absolute", transfers=False,
           formula="process CPU time of one call, all threads",
           bias=_THIS_HOUR),
    Metric("crossover_length", "tokens", "lower", "exact", transfers=True,
           formula="the first length from which on the arm costs fewer FLOPs than the baseline, by closed forms",
           bias="a FLOP of one is not as fast as a FLOP of the other: a clock's crossing lies elsewhere"),
    Metric("dead_experts", "experts", "lower", "exact", transfers=True,
           formula="experts that no token chose, mean over layers",
           bias="depends on the number of tokens looked at"),
    Metric("decode_cpu_ratio", "ratio", "lower", "paired", transfers=False,
           formula="CPU time of one generated token, arm / baseline, median over blocks",
           bias=_CPU_RATIO),
    Metric("decode_wall_ratio", "ratio", "lower", "paired", transfers=False,
           formula="wall time of one generated token, arm / baseline, median over blocks",
           bias=_WALL_RATIO),
    Metric("drop_floor", "share", "none", "exact", transfers=True,
           formula="mean drop share when each token picks K distinct experts uniformly at random",
           bias="Monte-Carlo mean of a fixed seed"),
    Metric("drop_share", "share", "lower", "exact", transfers=True,
           formula="assignments refused by full experts / all assignments",
           bias="counts assignments, not the weight they carried"),
    Metric("effective_experts", "experts", "higher", "exact", transfers=True,
           formula="exp(entropy of the load shares): how many equally loaded experts would be as diverse",
           bias="depends on the number of tokens looked at"),
    Metric("empty_slot_share", "share", "lower", "exact", transfers=True,
           formula="slots of experts with a fixed capacity that no token takes / all slots",
           bias="1 - 1/factor even in perfect balance"),
    Metric("energy_per_token", "J/token", "lower", "absolute", transfers=False,
           formula="(energy of the window - idle power x its length) / tokens",
           bias="the counter samples part of the time, in steps of 20 to 100 ms: a window holds at least 20 steps"),
    Metric("excess_max_vio", "ratio", "lower", "exact", transfers=True,
           formula="max_vio / its mean under uniformly random routing of as many tokens",
           bias="the floor is a Monte-Carlo mean of a fixed seed"),
    Metric("flops", "FLOP", "lower", "exact", transfers=True,
           formula="floating-point operations of the measured call: 2 m n k per matrix product",
           bias="matrix products and attention only, no element-wise work; masked dense attention counts as dense"),
    Metric("flops_per_token", "FLOP", "lower", "exact", transfers=True,
           formula="floating-point operations of training on one token: products, and attention to the keys it sees",
           bias="matrix products and attention only; recomputation is left out"),
    Metric("forward_backward_cpu_ratio", "ratio", "lower", "paired", transfers=False,
           formula="CPU time of forward and backward, arm / baseline, median over blocks",
           bias=_CPU_RATIO),
    Metric("forward_backward_wall_ratio", "ratio", "lower", "paired", transfers=False,
           formula="wall time of forward and backward, arm / baseline, median over blocks",
           bias=_WALL_RATIO),
    Metric("forward_cpu_ratio", "ratio", "lower", "paired", transfers=False,
           formula="CPU time of forward, arm / baseline, median over blocks",
           bias=_CPU_RATIO),
    Metric("forward_flops", "FLOP", "lower", "exact", transfers=True,
           formula="floating-point operations of forward: 2 m n k per matrix product",
           bias="matrix products and attention only; element-wise work is left out"),
    Metric("forward_wall_ratio", "ratio", "lower", "paired", transfers=False,
           formula="wall time of forward, arm / baseline, median over blocks",
           bias=_WALL_RATIO),
    Metric("gemm_flops_per_second", "FLOP/s", "higher", "absolute", transfers=False,
           formula="2 n^3 / fastest time of a square matrix product",
           bias="the maximum of ten calls: a machine that is busy all the time reads low"),
    Metric("gini", "share", "lower", "exact", transfers=True,
           formula="Gini coefficient of the load of experts: 0 all equal, 1 - 1/E one takes all",
           bias="above 0 for random routing too; read it beside the number of tokens"),
    Metric("gradient_bytes", "B", "lower", "exact", transfers=True,
           formula="bytes of all gradients on one device",
           bias="buffers of collectives come on top"),
    Metric("gradient_error", "relative", "lower", "exact", transfers=True,
           formula="norm(gradient - reference) / norm(reference)",
           bias="exact for one build of the kernels; another library rounds differently"),
    Metric("kv_bytes_per_token", "B/token", "lower", "exact", transfers=True,
           formula="bytes that a decoding cache keeps for one token, all layers",
           bias="pages and padding of a serving system come on top"),
    Metric("live_bytes", "B", "lower", "exact", transfers=False,
           formula="highest sum of live tensor bytes during the call, state (weights, optimizer, inputs) included",
           bias="tensor memory only: interpreter and library heaps (1 to 2%) are not seen; scratch varies by build"),
    Metric("load_cv", "ratio", "lower", "exact", transfers=True,
           formula="standard deviation / mean of the load of experts",
           bias="above 0 for random routing too; read it beside the number of tokens"),
    Metric("loss", "nat/token", "lower", "absolute", transfers=True,
           formula="mean cross-entropy of the next token on held-out text",
           bias=_ONE_RUN),
    Metric("loss_gap", "nat/token", "lower", "paired", transfers=True, signed=True,
           formula="held-out loss of the arm - of the baseline, same seed and text",
           bias="same seed does not mean same initial weights where shapes differ"),
    Metric("max_vio", "ratio", "lower", "exact", transfers=True,
           formula="(largest load of an expert - mean load) / mean load (arXiv 2408.15664 eq. 4)",
           bias="random routing alone gives about sqrt(2 ln E / rows per expert); see excess_max_vio"),
    Metric("mfu", "share", "higher", "absolute", transfers=False,
           formula="FLOP of the model per second / peak FLOP per second of the card in that format",
           bias="peaks are the vendor's, at boost clock; recomputation is not counted as useful"),
    Metric("mtp_acceptance", "share", "higher", "exact", transfers=True,
           formula="held-out positions where the extra head's first guess equals the main head's",
           bias="greedy agreement, not the speed-up of speculative decoding"),
    Metric("optimizer_bytes", "B", "lower", "exact", transfers=True,
           formula="bytes of moments and master weights on one device",
           bias="a step counter for each parameter tensor is left out"),
    Metric("overflow_share", "share", "lower", "exact", transfers=True,
           formula="elements whose magnitude exceeds the format's largest, counted before clamping / all",
           bias="of the tensors looked at"),
    Metric("parameter_bytes", "B", "lower", "exact", transfers=True,
           formula="bytes of all weights that products read, on one device",
           bias="master weights count as optimizer state"),
    Metric("parameters", "parameters", "none", "exact", transfers=True,
           formula="trainable parameters, tied ones once",
           bias="none"),
    Metric("peak_activations", "microbatches", "lower", "exact", transfers=True,
           formula="most forward results that a rank holds at once, largest rank",
           bias="counts microbatches of a stage, not bytes"),
    Metric("peak_bytes", "B", "lower", "exact", transfers=False,
           formula="highest sum of live tensor bytes during the call - the sum at its start",
           bias="tensor memory only: interpreter and library heaps (1 to 2%) are not seen; scratch varies by build"),
    Metric("rank_bytes", "B", "lower", "exact", transfers=True,
           formula="bytes of the fullest rank of a split at its peak, by arithmetic, by kind",
           bias="fragments of an allocator, buffers of collectives and the driver's own memory come on top"),
    Metric("read_bytes", "B", "lower", "exact", transfers=True,
           formula="bytes of one layer's cache that a decoded token reads",
           bias="each byte once; rows that are gathered come in whole cache lines"),
    Metric("relative_cost", "ratio", "lower", "exact", transfers=True,
           formula="price of a training run / of the peer's: tokens x FLOPs per token / (peak x utilisation) x price",
           bias="arithmetic on inputs that are named beside it; nothing is said of the quality of either model"),
    Metric("run_dollars", "$", "lower", "exact", transfers=True,
           formula="hours of a card x its price",
           bias="arithmetic: the final run alone, without research, failures and data"),
    Metric("run_hours", "h", "lower", "exact", transfers=True,
           formula="tokens x FLOPs per token / (cards x peak x utilisation)",
           bias="arithmetic on a utilisation that is assumed"),
    Metric("saved_bytes", "B", "lower", "exact", transfers=True,
           formula="bytes of distinct storages kept for backward at the end of forward, parameters excluded",
           bias="a view keeps its whole storage, which is counted once"),
    Metric("scaling_exponent", "exponent", "lower", "paired", transfers=True, signed=True,
           formula="slope of log(time or count) over log(length), least squares",
           bias="an exponent of a finite range of lengths; fixed costs at short lengths pull it down"),
    Metric("selection_cpu_share", "share", "lower", "paired", transfers=False,
           formula="CPU time of choosing the keys / of the forward pass that uses them, median over blocks",
           bias="gathering the chosen keys counts as attention"),
    Metric("selection_scores", "scores", "lower", "exact", transfers=True,
           formula="products of a query and a summary of keys that choosing takes, one head, a whole sequence",
           bias="by the closed form that tests hold the search to; sorting and gathering cost extra"),
    Metric("selection_share", "share", "lower", "exact", transfers=True,
           formula="(query, key) pairs kept / pairs visible under causality",
           bias="work, not time: gathering costs extra"),
    Metric("sent_bytes", "B", "lower", "exact", transfers=True,
           formula="bytes that one rank sends in a training step, by arithmetic for rings, by kind of parallelism",
           bias="rows for experts are sent apiece; scalars are left out"),
    Metric("skipped_steps", "share", "lower", "exact", transfers=True,
           formula="steps whose update was dropped because a gradient was not finite / all steps",
           bias=_ONE_RUN),
    Metric("sm_clock_mhz", "MHz", "none", "absolute", transfers=False,
           formula="median clock of the streaming multiprocessors after each call of a window",
           bias="read between calls, where the card may already slow down"),
    Metric("small_value_error", "relative", "lower", "exact", transfers=True,
           formula="mean of |x - quantised x| / |x| over the tenth of the non-zero elements that are smallest",
           bias="of the tensors looked at; 1 means that they are lost whole"),
    Metric("sqnr", "dB", "higher", "exact", transfers=True, signed=True,
           formula="10 log10(sum x^2 / sum (x - quantised x)^2)",
           bias="outliers carry the energy: small values may be lost at a high figure; see underflow_share"),
    Metric("step_cpu_ratio", "ratio", "lower", "paired", transfers=False,
           formula="CPU time of a training step, arm / baseline, median over blocks",
           bias=_CPU_RATIO),
    Metric("step_wall_ratio", "ratio", "lower", "paired", transfers=False,
           formula="wall time of a training step, arm / baseline, median over blocks",
           bias=_WALL_RATIO),
    Metric("steps_to_criterion", "steps", "lower", "absolute", transfers=True,
           formula="steps until validation rows are first answered at 99%",
           bias="the whole training where they never were, which is then a lower bound; looks are some steps apart"),
    Metric("tokens_per_second", "token/s", "higher", "absolute", transfers=False,
           formula="tokens of a training step / its wall time",
           bias=_THIS_HOUR),
    Metric("trailing_loss", "nat/token", "lower", "absolute", transfers=True,
           formula="mean of -log p(next token) over the last quarter of each held-out row",
           bias=_ONE_RUN),
    Metric("train_loss", "nat/token", "lower", "absolute", transfers=True,
           formula="mean cross-entropy of the next token over the last tenth of the steps",
           bias=_ONE_RUN),
    Metric("underflow_share", "share", "lower", "exact", transfers=True,
           formula="non-zero elements that the format turns to zero / non-zero elements",
           bias="of the tensors looked at"),
    Metric("wall_seconds", "s", "lower", "absolute", transfers=False,
           formula="wall time of one call",
           bias=_THIS_HOUR),
)
# fmt: on


def metric(name: str) -> Metric:
    """The row of that name.

    Raises:
        ValueError: for a name that is not in the table, with the nearest ones.
    """
    for row in METRICS:
        if row.name == name:
            return row
    near = get_close_matches(name, [row.name for row in METRICS], n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "add a row to bench/metrics.py"
    raise ValueError(f"metric={name!r}: is not in the table of metrics; {hint}")
