"""Working memory: how far the peak of a step lies above what forward kept, by arithmetic.

Backward goes from the last part to the first, and frees what forward kept of a part when it has passed it. So the peak
is the highest of a few moments, each with what is gone by then (-) and what is there for a while (+). Symbols are those
of `activations`; D is the model's width, M = N K the rows of experts, F a feed-forward network's or an expert's width:

    loss, forward      + the logits of every head, e N V each, and the last head's again in fp32, 4 N V, if e < 4
    loss, backward     + two gradients of the last head's, 4 N V each: of its log-probabilities and of its logits
    heads              - all log-probabilities; + the gradients of all logits, e N V each, and of the head's weight;
                       where several heads share it, three times: of two of them, and the sum
    last norm          - all log-probabilities; + five numbers in fp32 for each that it gave, 20 N D
    experts, the sum   - the shared experts; + the sum's gradient row by row, in fp32 and again in e, (4 + e) M D
    experts, gate, up  - what experts kept but their gathered rows; + the gradients of gate and up, 2 e M F, of the
                       rows, e M D, and of their weight
    experts, fp32      - the shared experts; + the gradients of both weights at once, since the loop is one operator,
                       of its input, of its sum and of the shared experts' input, 4 N D each
    dense              + the gradients of the block's output, e N D, of what down_proj reads, e N F, and of its weight
                       or, what it read being gone, of both factors
    attention          - the feed-forward network; + the gradients of q, k, v and out
    embedding          + the gradients of what it gave, e N D, and of its weight; a tied head's waits for it

Blocks and embedding also lack everything after them. The gradient of a weight is there twice until it is added to that
of the microbatches before. A block that a policy runs again is whole again, its input beside it. Under ZeRO-3 the
gathered weights of the part come on top. Not counted: what operators take and give back inside themselves (`allocator`
names it), buffers of collectives, the allocator's own fragments, the CUDA context.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from bench.budget.activations import Batch, Kept, Policy, block, core_widths, kept
from bench.budget.splits import Split, cut, divided
from bench.budget.states import Recipe
from dsv3.config import Model
from dsv3.model.cost import mtp_depths, parameter_shapes


@dataclass(frozen=True, kw_only=True)
class Moments:
    """One microbatch on a rank of a split."""

    model: Model
    split: Split
    recipe: Recipe
    batch: Batch
    policy: Policy

    def kept(self, here: tuple[str, ...]) -> int:
        """Bytes that the parts `here` keep for backward."""
        return sum(self._bytes(self._kept[part]) for part in here)

    @cached_property
    def _kept(self) -> dict[str, tuple[Kept, ...]]:
        return kept(self.model, self.batch, self.policy)

    def highest(self, here: tuple[str, ...]) -> int:
        """Bytes at the highest moment of backward through the parts `here`, above what they keep; at least 0."""
        return max(0, *self._above(here))

    def _above(self, here: tuple[str, ...]) -> Iterator[int]:
        gone = waiting = 0
        gathered = 1 if self.split.zero == 3 else 0
        table = self._weights("embed_tokens.", max)
        if "head" in here:
            yield from self._losses()
            gone = sum(self._bytes(self._kept[part], "loss") for part in here)
            tied = self.model.tie_word_embeddings
            weight = table if tied else self._weights("lm_head.", max)
            yield self._logits(0) + (1 + gathered) * weight - gone
            if mtp_depths(self.model) > 0:
                yield self._logits(2) + (3 + gathered) * weight - gone
            yield 5 * 4 * self._hidden(self.batch) // self.batch.element - gone
            waiting = table if tied and "embed_tokens" in here else 0
        for part in reversed(here):
            if "." in part:
                passed = gone + (self._bytes(self._kept["head"], "norms", "head") if part.startswith("mtp") else 0)
                yield from (waiting + moment - passed for moment in self._inside(part))
            gone += self._bytes(self._kept[part]) - self._bytes(self._kept[part], "loss")
        if "embed_tokens" in here:
            yield self._hidden(self.batch) + (1 + gathered) * table + 2 * waiting - gone

    def _losses(self) -> Iterator[int]:
        last = self.batch.shorter(mtp_depths(self.model)).tokens * self.model.vocab_size // self.split.tp
        yield self._logits(0) + (4 * last if self.batch.element < 4 else 0)
        yield 8 * last

    def _logits(self, first: int) -> int:
        """Of all heads from depth `first` of multi-token prediction on; 0 is the main head."""
        tokens = sum(self.batch.shorter(depth).tokens for depth in range(first, mtp_depths(self.model) + 1))
        return self.batch.element * tokens * self.model.vocab_size // self.split.tp

    def _inside(self, part: str) -> Iterator[int]:
        kind, _, number = part.partition(".")
        mtp = kind == "mtp"
        layer = int(number) + (self.model.num_hidden_layers if mtp else 0)
        batch = self.batch.shorter(int(number) + 1) if mtp else self.batch
        whole = tuple(block(self.model, layer, batch, "none"))
        again = 0
        if self.policy != "none":
            left = self._bytes(block(self.model, layer, batch, self.policy))
            again = self._bytes(whole) - left + self._hidden(batch)
        prefix = f"{part}.block." if mtp else f"{part}."
        gathered = self._weights(prefix, sum) if self.split.zero == 3 else 0
        fed = self._experts if self.model.is_moe_layer(layer) else self._dense
        for moment in (*fed(batch, whole, prefix), self._attention(batch, whole)):
            yield again + gathered + moment

    def _experts(self, batch: Batch, whole: tuple[Kept, ...], prefix: str) -> Iterator[int]:
        moe, e, width = self.model.moe, batch.element, self.model.hidden_size
        assert moe is not None, "a layer with experts comes from a model with experts"
        shared = self._bytes(whole, "shared experts")
        gate_up, down = (self._weights(f"{prefix}mlp.experts.{name}", max) for name in ("gate_up", "down"))
        if e == 4:
            yield gate_up + down + 3 * self._hidden(batch) - shared
            return
        rows = batch.tokens * moe.num_experts_per_tok
        inner = moe.moe_intermediate_size // self.split.tp
        yield (4 + e) * rows * width - shared
        yield e * rows * (2 * width + 2 * inner) + gate_up - shared - self._bytes(whole, "experts")

    def _dense(self, batch: Batch, whole: tuple[Kept, ...], prefix: str) -> Iterator[int]:
        inner = self.model.intermediate_size // self.split.tp
        product = batch.element * batch.tokens * inner
        yield self._hidden(batch) + product + max(product, self._weights(f"{prefix}mlp.", max))

    def _attention(self, batch: Batch, whole: tuple[Kept, ...]) -> int:
        gradients = batch.element * batch.tokens * sum(core_widths(self.model, batch)[:4]) // self.split.tp
        return gradients - self._bytes(whole, "router", "experts", "shared experts", "dense")

    def _weights(self, prefix: str, of: Callable[[Iterable[int]], int]) -> int:
        """Bytes of the rank's piece of the weights of that name: `of` is sum or max."""
        return self.recipe.weight * of(size for name, size in self._sizes.items() if name.startswith(prefix))

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {name: cut(name, shape, self.split) for name, shape in parameter_shapes(self.model).items()}

    def _hidden(self, batch: Batch) -> int:
        """What a block gives: e N D, or the rank's piece of a sequence that is cut."""
        ways = self.split.tp if self.split.sequence_parallel else 1
        return batch.element * batch.tokens * self.model.hidden_size // ways

    def _bytes(self, items: Iterable[Kept], *modules: str) -> int:
        """Of these modules' items, or of all."""
        return sum(divided(item, self.split) for item in items if not modules or item.module in modules)
