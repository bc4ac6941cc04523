"""What the paired timing gate times: training steps, a prompt, a token, a step of two processes.

Every case is a context that yields a call. It imports what it needs when it is entered, from as few names as it can, so
that an older dsv3 serves the cases it has and fails alone at those it has not. The sizes are those of the exact gate
(`bench.variants`): a call takes 1 to 12 ms at one thread, a turn of calls about 10. Nothing is imported from torch or
dsv3 before a case is entered.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any, Literal

BATCH, LENGTH, VOCABULARY = 2, 32, 256
PROMPTS, PROMPT_LENGTH = 4, 64
MODEL = {
    "model.vocab_size": VOCABULARY,
    "model.hidden_size": 64,
    "model.num_hidden_layers": 2,
    "model.intermediate_size": 128,
    "model.mtp": None,
    "train.batch_size": BATCH,
    "train.sequence_length": LENGTH,
}

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A piece of work and the clock that decides about it.

    make      a context that yields the call; torch is told to use one thread before
    calls     of a turn, so many that it takes about 10 ms
    clock     "cpu": process CPU time, which does not count waiting for a core; "wall" where waiting is the work
    """

    make: Callable[[], AbstractContextManager[Call]]
    calls: int
    clock: Literal["cpu", "wall"] = "cpu"


@contextmanager
def step(changes: Mapping[str, Any] | None = None) -> Iterator[Call]:
    """A training step of the base with these choices changed, on the same rows again and again."""
    from dsv3.train.state import TrainState
    from dsv3.train.step import train_step

    state, rows = TrainState.create(config(changes), seed=0), tokens(BATCH, LENGTH + 1)
    yield lambda: train_step(state, rows)


def step_multi_head() -> AbstractContextManager[Call]:
    """Plain attention in place of the latent one."""
    from dsv3.config import Everything, MultiHead

    return step({"model.attention": MultiHead(num_attention_heads=4, head_dim=16, select=Everything())})


def step_per_head() -> AbstractContextManager[Call]:
    """Every head keeps the three tenths of the keys that it scores highest."""
    from dsv3.config import MultiHead, PerHead

    return step({"model.attention": MultiHead(num_attention_heads=4, head_dim=16, select=PerHead(keep=0.3))})


def step_hierarchical() -> AbstractContextManager[Call]:
    """Every block of queries looks for one key block beside those that it always sees, in a tree over the blocks."""
    from dsv3.config import Hierarchical, MultiHead

    select = Hierarchical(k=5, block_q=8, block_k=4, branching=2)
    return step({"model.attention": MultiHead(num_attention_heads=4, head_dim=16, select=select)})


def step_capacity() -> AbstractContextManager[Call]:
    """Experts with a capacity, so that some assignments find no place."""
    from dsv3.config import Fixed

    return step({"model.moe.capacity": Fixed(factor=1.2)})


def step_bfloat16() -> AbstractContextManager[Call]:
    """Autocast to bfloat16."""
    from dsv3.config import BFloat16

    return step({"train.precision": BFloat16()})


@contextmanager
def serve(*, decode: bool) -> Iterator[Call]:
    """Reading prompts into an empty cache, or one token after each of them."""
    import torch

    from dsv3.attention import KeyValueCache
    from dsv3.model import Transformer

    chosen = config().model
    model, rows = Transformer(chosen, seed=0).eval(), tokens(PROMPTS, PROMPT_LENGTH + 1)
    prompt, token = rows[:, :-1], rows[:, -1:]
    cache = KeyValueCache.empty(chosen, PROMPTS, PROMPT_LENGTH + 1)
    if decode:
        with torch.inference_mode():
            cache = model(prompt, cache=cache).cache

    @torch.inference_mode()
    def call() -> object:
        return model(token if decode else prompt, cache=cache)

    yield call


@contextmanager
def step_two_processes() -> Iterator[Call]:
    """A data-parallel step of this process and a forked one: the call ends when both have exchanged gradients."""
    import torch
    from torch import multiprocessing

    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")  # a spawned one would import torch again, 3 seconds a block
    ours, theirs = context.Pipe()
    with TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        other = context.Process(target=_other_process, args=(meeting, ours, theirs), daemon=True)
        other.start()
        theirs.close()
        with _member(0, meeting) as take_step:

            def call() -> None:
                ours.send(True)
                take_step()

            yield call
        ours.close()
        other.join()


def _other_process(meeting: str, ours: Any, theirs: Any) -> None:
    ours.close()  # the fork copied it: open here, its closing there would go unnoticed
    with _member(1, meeting) as take_step:
        try:
            while theirs.recv():
                take_step()
        except EOFError:
            return


@contextmanager
def _member(rank: int, meeting: str) -> Iterator[Call]:
    from torch import distributed

    from dsv3.parallel import Ranks
    from dsv3.train.state import TrainState
    from dsv3.train.step import train_step

    # The state first: where an older dsv3 cannot make it, neither process waits for the other.
    state, rows = TrainState.create(config(), seed=0), tokens(BATCH, LENGTH + 1)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    ranks = Ranks(rank=rank, world=2, group=distributed.group.WORLD)
    yield lambda: train_step(state, rows, ranks=ranks)
    distributed.destroy_process_group()


def config(changes: Mapping[str, Any] | None = None) -> Any:
    """The base: latent attention, a dense layer and one of 8 experts, dropless; with these choices changed."""
    from dsv3.config import Latent, MoE, presets, vary

    attention = Latent(
        num_attention_heads=4,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
    )
    moe = MoE(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32)
    base = vary(presets.tiny(), **MODEL, **{"model.attention": attention, "model.moe": moe})
    return vary(base, **(changes or {}))


def tokens(rows: int, length: int) -> Any:
    """Generated rows [rows, length], the same in every process."""
    import torch

    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


# Two processes first: the fork must come before this process has threads of its own.
CASES: Mapping[str, Case] = {
    "step_two_processes": Case(step_two_processes, calls=2, clock="wall"),
    "step_base": Case(step, calls=2),
    "step_multi_head": Case(step_multi_head, calls=2),
    "step_per_head": Case(step_per_head, calls=1),
    "step_hierarchical": Case(step_hierarchical, calls=1),
    "step_capacity": Case(step_capacity, calls=2),
    "step_bfloat16": Case(step_bfloat16, calls=1),
    "prefill": Case(lambda: serve(decode=False), calls=4),
    "decode": Case(lambda: serve(decode=True), calls=12),
}
