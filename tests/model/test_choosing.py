"""What choosing keys by content costs, against numbers worked by hand and products counted as they run."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.meters.scores import scores
from dsv3.attention import KeyValueCache, Selection, build
from dsv3.attention import latent as in_latent
from dsv3.attention import multi_head as in_multi_head
from dsv3.attention.select import select
from dsv3.attention.select.index import bounds
from dsv3.config import Attention, Auto, Blocks, Everything, Grouped, Hierarchical, MultiHead, PerHead, vary
from dsv3.model import cost
from dsv3.model.choosing import decoding_flops, selection_flops
from tests.model.variants import BASE, latent

ATTENTIONS: dict[str, Attention] = {
    "multi_head": MultiHead(num_attention_heads=4, head_dim=10),
    "grouped": Grouped(num_attention_heads=4, num_key_value_heads=2, head_dim=10),
    "latent": latent(),
}
CHOICES: dict[str, Blocks] = {
    "flat": Blocks(k=4, block_q=2, block_k=2),
    "group": Hierarchical(k=4, block_q=1, block_k=2, branching=2, sharing="group"),
    "all": Hierarchical(k=5, block_q=4, block_k=2, branching=2, sharing="all"),
    "plain": Hierarchical(k=4, block_q=1, block_k=2, branching=2, rotated=False),
    "best_first": Hierarchical(k=4, block_q=1, block_k=2, branching=2, search="best_first"),
    "auto": Auto(k=4, block_q=2, block_k=2, branching=2, crossover=20),
}
LENGTH = 45
every_attention = pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS.keys())
every_choice = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())


def test_choosing_worked_by_hand() -> None:
    """Six tokens, a key a block, four of them seen: the last two queries score 2 and 3 blocks."""
    choice = Blocks(k=4, block_q=1, block_k=1)
    assert selection_flops(MultiHead(num_attention_heads=2, head_dim=8, select=choice), 6) == 2 * 2 * 8 * 5
    assert selection_flops(vary(ATTENTIONS["grouped"], select=vary(choice, sharing="group")), 6) == 2 * 2 * 10 * 5
    assert selection_flops(vary(ATTENTIONS["grouped"], select=vary(choice, sharing="all")), 6) == 2 * 1 * 20 * 5
    # two heads compare in the latent's space, [8 ; 4] wide, or 8 before rotation; six queries of 6 are brought there
    moved = 6 * 2 * 2 * 6 * 8
    assert selection_flops(latent(select=choice), 6) == 2 * 2 * 12 * 5 + moved
    assert selection_flops(latent(select=vary(choice, rotated=False)), 6) == 2 * 2 * 8 * 5 + moved
    assert [decoding_flops(latent(select=choice), t) for t in (4, 5, 6)] == [moved // 6 + 48 * s for s in (0, 2, 3)]
    # in blocks of two queries the first alone is brought there, for both
    pairs = Blocks(k=10, block_q=2, block_k=2)
    assert [decoding_flops(latent(select=pairs), t) for t in (1, 2, 3, 4)] == [moved // 6, 0, moved // 6, 0]
    # a walk looks at the forced blocks too, 4 and 5 in all; a bound has two numbers a column
    beam = Hierarchical(k=4, block_q=1, block_k=1)
    assert selection_flops(latent(select=beam), 6) == 2 * 2 * 12 * 9 + moved
    assert selection_flops(latent(select=vary(beam, search="best_first")), 6) == 2 * 2 * 24 * 9 + moved
    assert selection_flops(MultiHead(num_attention_heads=2, head_dim=8, select=PerHead(k=3)), 6) == 0


@every_attention
@every_choice
def test_a_forward_pass_scores_what_is_counted(attention: Attention, choice: Blocks) -> None:
    model = vary(BASE, attention=vary(attention, select=choice), max_position_embeddings=64)
    made = build(model, 0)
    with torch.no_grad():
        _, selection = made(torch.randn(1, LENGTH, 20))
    assert selection is not None
    width = made_width(attention, choice)
    moved = selection_flops(vary(attention, select=vary(choice, k=LENGTH)), LENGTH)  # nothing left out, nothing scored
    counted, found = selection_flops(model.attention, LENGTH) - moved, 2 * width * selection.cost.scored
    assert counted > 0
    assert counted < found if bounds(choice) else counted == found


@every_attention
@every_choice
def test_decoding_a_token_computes_what_is_counted(
    attention: Attention, choice: Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = vary(BASE, attention=vary(attention, select=choice), max_position_embeddings=64)
    made, cache = build(model, 0), KeyValueCache.empty(model, 1, 64)
    width, counts = made_width(attention, choice), []

    def counting(*given: object, **options: object) -> Selection | None:
        found: list[Selection | None] = []
        counts.append(scores(lambda: found.append(select(*given, **options)), width))
        return found[0]

    for room in (in_latent, in_multi_head):
        monkeypatch.setattr(room, "select", counting)
    with torch.no_grad():
        for visible in range(1, LENGTH + 1):
            made(torch.randn(1, 1, 20), cache=cache.layers[0])
            cache, count = cache.advance(1), counts[-1]
            moved = decoding_flops(vary(attention, select=vary(choice, k=LENGTH)), visible)
            counted = decoding_flops(model.attention, visible) - moved
            assert counted <= 2 * width * count if bounds(choice) else counted == 2 * width * count
    assert counted > 0


def test_queries_brought_into_the_latents_space_are_counted_by_torch() -> None:
    """Where every block is seen nothing is scored, so that the rest is what choosing adds. In float64, since our kernel
    counts the pairs of attention, torch's own does not.
    """
    x, found = torch.randn(1, LENGTH, 20, dtype=torch.float64), []
    for choice in (Blocks(k=LENGTH, block_q=4, block_k=2), Everything()):
        made = build(vary(BASE, attention=latent(select=choice)), 0).double()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            made(x)
        found.append(counter.get_total_flops())
    assert found[0] - found[1] == selection_flops(latent(select=Blocks(k=LENGTH, block_q=4, block_k=2)), LENGTH)


def test_choosing_is_paid_forward_and_not_backward() -> None:
    model = vary(BASE, attention=latent(select=CHOICES["plain"]), mtp=None)
    flops = cost.forward_flops(model, LENGTH)
    chosen = [value for name, value in flops.items() if name.endswith(".self_attn.selection.scores")]
    assert chosen == [selection_flops(model.attention, LENGTH)] * 3
    forward = sum(flops.values())
    assert cost.flops_per_token(model, LENGTH) == forward / LENGTH
    assert cost.flops_per_token(model, LENGTH, training=True) == (3 * forward - 2 * sum(chosen)) / LENGTH


def made_width(attention: Attention, choice: Blocks) -> int:
    """Numbers of a node, read off the index that a cache of this attention holds."""
    model = vary(BASE, attention=vary(attention, select=choice))
    index = KeyValueCache.empty(model, 1, 64).layers[0].index
    assert index is not None
    return index.nodes[0].shape[-1]


def test_what_a_choice_learns_by_worked_by_hand() -> None:
    """Six tokens, a key a block, four of them seen: 0, 1, 2, 3, 3, 3 of them before the query's own, in two heads of
    8.
    """
    choice = Blocks(k=4, block_q=1, block_k=1)
    plain = vary(BASE, attention=MultiHead(num_attention_heads=2, head_dim=8, select=choice), mtp=None)
    learns = {
        way: vary(plain, **{"attention.select.learns": way}) for way in ("branch", "distilled", "gated", "entmax")
    }
    before, scored, layers = cost.forward_flops(plain, 6), 2 * 2 * 8 * 12, range(3)
    for way in ("gated", "entmax"):
        added = {f"layers.{layer}.self_attn.learning.scores": scored for layer in layers}
        assert cost.forward_flops(learns[way], 6) == before | added
    # a branch sees 1 ... 6 means of keys and of values; its gates are a map from 20 to 4
    added = {f"layers.{layer}.self_attn.branch.scores": 2 * 2 * 2 * 8 * 21 for layer in layers}
    added |= {f"layers.{layer}.self_attn.gates.weight": 2 * 20 * 4 * 6 for layer in layers}
    assert cost.forward_flops(learns["branch"], 6) == before | added
    assert cost.parameters(learns["branch"]) == cost.parameters(plain) + 3 * 20 * 4
    # logits of 12 pairs once more, and scores forward and backward
    assert cost.forward_flops(learns["distilled"], 6) == before
    loss = cost.flops_per_token(learns["distilled"], 6, training=True) - cost.flops_per_token(plain, 6, training=True)
    assert loss * 6 == pytest.approx(3 * (2 * 2 * 8 * 12 + 3 * scored), rel=1e-12)
    assert cost.decode_flops(learns["distilled"], 6) == cost.decode_flops(plain, 6)
    assert cost.decode_flops(learns["gated"], 6) - cost.decode_flops(plain, 6) == 3 * 2 * 2 * 8 * 3
    assert cost.decode_flops(learns["branch"], 6) - cost.decode_flops(plain, 6) == 3 * (2 * 20 * 4 + 4 * 2 * 8 * 6)


@pytest.mark.parametrize("total", [1, 7, 45])
@pytest.mark.parametrize(
    "choice", [vary(CHOICES["flat"], learns="gated"), vary(CHOICES["all"], learns="gated")], ids=str
)
def test_scores_that_learn_are_as_many_as_are_taken(choice: Blocks, total: int) -> None:
    model = vary(BASE, attention=vary(ATTENTIONS["grouped"], select=choice), max_position_embeddings=64)
    with torch.no_grad():
        _, selection = build(model, 0)(torch.randn(1, total, 20))
    assert selection is not None
    complete = torch.arange(0, total, choice.block_q)[:, None] // choice.block_k
    listed = torch.arange(selection.indices.shape[-1]) < selection.counts[..., None]
    taken = int((listed & (selection.indices < complete)).sum())
    width = made_width(model.attention, choice)
    flops = cost.forward_flops(vary(model, mtp=None), total)
    assert flops["layers.0.self_attn.learning.scores"] == 2 * width * taken
