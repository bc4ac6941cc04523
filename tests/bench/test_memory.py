"""Peak bytes against cases whose peak can be said beforehand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bench.meters.memory import peak_bytes, peak_of

MIB = 2**20


def ones() -> Tensor:
    return torch.ones(MIB)


class Holder:
    """A mutable place for a tensor."""

    def __init__(self) -> None:
        self.x = ones()


def replace_after_freeing(holder: Holder) -> None:
    del holder.x
    holder.x = ones()


def replace_before_freeing(holder: Holder) -> None:
    holder.x = ones()


def test_a_chain_of_two_temporaries_peaks_at_both() -> None:
    # The second result exists before the first is freed: 2 x 4 MiB, and the scalars as tensors of at most 16 bytes.
    peak, _, _ = peak_bytes(ones, lambda a: (a * 2) + 1)
    assert 8 * MIB <= peak.value <= 8 * MIB + 32


def test_in_place_work_takes_no_memory() -> None:
    peak, _, allocations = peak_bytes(ones, lambda a: a.neg_())
    assert (peak.value, allocations.value) == (0, 0)


def test_memory_freed_in_the_call_pays_for_what_follows() -> None:
    peak, _, allocations = peak_bytes(Holder, replace_after_freeing)
    assert (peak.value, allocations.value) == (0, 1)


def test_live_bytes_are_the_state_and_the_peak_above_it() -> None:
    peak, live, _ = peak_bytes(Holder, replace_before_freeing)
    assert (peak.value, live.value) == (4 * MIB, 8 * MIB)


def test_a_new_block_before_the_old_is_freed_is_the_peak() -> None:
    peak, _, _ = peak_bytes(Holder, replace_before_freeing)
    assert peak.value == 4 * MIB


def test_one_more_allocation_shows() -> None:
    def more(a: Tensor) -> None:
        torch.empty(1)
        a.neg_()

    _, _, allocations = peak_bytes(ones, more)
    assert allocations.value == 1


def test_optimizer_state_is_not_charged_to_the_measured_step() -> None:
    def build() -> tuple[nn.Parameter, torch.optim.AdamW]:
        parameter = nn.Parameter(ones())
        return parameter, torch.optim.AdamW([parameter], foreach=False)

    def step(state: tuple[nn.Parameter, torch.optim.AdamW]) -> None:
        parameter, optimizer = state
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        parameter.grad = None

    peak, _, _ = peak_bytes(build, step)
    # The gradient, the square root of the second moment and one quotient: 3 x 4 MiB. Building the moments would add 8.
    assert 8 * MIB <= peak.value < 13 * MIB


def test_the_figure_repeats_to_the_byte() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(63, 100), nn.GELU(), nn.Linear(100, 1))

    def step(module: nn.Module) -> None:
        module.zero_grad()
        module(torch.ones(60, 63)).sum().backward()

    assert peak_bytes(build, step) == peak_bytes(build, step)


@given(st.lists(st.integers(-100, 100)))
def test_the_peak_is_the_highest_prefix_sum(changes: list[int]) -> None:
    assert peak_of(changes) == max(sum(changes[:i]) for i in range(len(changes) + 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_reports_the_same_chain() -> None:
    peak, _, _ = peak_bytes(lambda: ones().cuda(), lambda a: (a * 2) + 1, device="cuda")
    assert peak.value == 8 * MIB
