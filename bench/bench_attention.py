"""Cases of attention: selected against dense, and the forms in which a layer remembers keys while it decodes.

Parity comes first: values and gradients with the float64 reference, decoding with the whole forward pass. The arms and
their sizes are those of `bench.attention` and `bench.decoding`.
"""

from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch

from bench import attention, block_attention, block_decoding, decoding
from bench.attention import Inputs
from bench.attention_sizes import ARMS
from bench.cases import Figures
from bench.measurement import Measurement
from bench.meters.flops import flops
from bench.meters.memory import peak_bytes
from bench.meters.saved import saved_bytes
from bench.record import Profile
from dsv3.attention import implementation, why_not_kernel

LENGTHS: Mapping[Profile, int] = {"quick": 1024, "full": 16384}
PHASES: Mapping[str, Callable[[str, Inputs], object]] = {
    "forward": attention.inference,
    "forward_backward": attention.training,
}


@pytest.mark.parametrize("phase", PHASES)
def bench_selected(
    measure_arms: Callable[..., Figures],
    keep: Callable[..., None],
    device: torch.device,
    profile: Profile,
    phase: str,
) -> None:
    """Window, per-head top-k and blocks by share against dense attention, fused and written out."""
    length, call = LENGTHS[profile], PHASES[phase]
    given = attention.inputs(length, device)
    # at the full profile's length the matrix of eager attention would take the machine's memory
    able = [arm for arm in ARMS if arm != "eager" or profile == "quick"]
    arms = [arm for arm in able if attention.why_not(arm, given) is None]

    def check() -> None:
        for arm in arms:
            attention.check(arm, given)

    measure_arms(
        phase=phase,
        baseline="sdpa",
        arms={arm: partial(call, arm, given) for arm in arms},
        check=check,
        axes={"length": length},
        tokens=length,
    )
    for arm in arms:
        keep(arm, _costs(arm, phase, length, device), baseline="sdpa", axes={"length": length, "phase": phase})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("phase", PHASES)
def bench_blocks(
    measure_arms: Callable[..., Figures], device: torch.device, profile: Profile, phase: str, dtype: torch.dtype
) -> None:
    """Attention to blocks, chosen flat and down a tree, against SDPA, plain PyTorch and FlexAttention.

    On a CPU the study attention_hierarchical has the time at one thread; this adds wall time at all cores.
    """
    if profile == "quick":
        pytest.skip("the study attention_hierarchical has it; --profile full measures it here too")
    length, given = LENGTHS[profile], block_attention.inputs(LENGTHS[profile], dtype, device)
    call = {"forward": block_attention.inference, "forward_backward": block_attention.training}[phase]
    arms = [arm for arm in block_attention.arms(dtype, phase) if block_attention.why_not(arm, given) is None]

    def check() -> None:
        for arm in arms:
            block_attention.check(arm, given)

    measure_arms(
        phase=phase,
        baseline="sdpa",
        arms={arm: partial(call, arm, given) for arm in arms},
        check=check,
        axes={"length": length, "dtype": str(dtype).removeprefix("torch.")},
        tokens=length,
    )


@pytest.mark.parametrize("length", [256, 512, 1024, 2048, 4096, 16384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("phase", PHASES)
def bench_auto(
    measure_arms: Callable[..., Figures],
    device: torch.device,
    profile: Profile,
    phase: str,
    dtype: torch.dtype,
    length: int,
) -> None:
    """A tree behind the crossover that was measured: against SDPA, in fp32 too, it should lose at no length."""
    if profile == "quick":
        pytest.skip("some minutes of long and short sequences: --profile full")
    given = block_attention.inputs(length, dtype, device)
    auto, call = {
        "forward": ("auto_forward", block_attention.inference),
        "forward_backward": ("auto_training", block_attention.training),
    }[phase]
    dense = ("sdpa",) if dtype == torch.float32 else ("sdpa", "sdpa_fp32")
    selection = block_attention.choose(auto, given)
    chosen = "dense" if selection is None else implementation(given.q, selection)
    measure_arms(
        phase=phase,
        baseline="sdpa",
        arms={arm: partial(call, arm, given) for arm in dense} | {"auto": partial(call, auto, given)},
        check=partial(block_attention.check, auto, given),
        axes={"length": length, "dtype": str(dtype).removeprefix("torch."), "implementation": chosen},
        blocks=7 if length > 4096 else None,  # a call of dense attention takes seconds there
        tokens=length,
    )


@pytest.mark.parametrize("batch", [1, 8])
def bench_decode_blocks(measure_arms: Callable[..., Figures], profile: Profile, batch: int) -> None:
    """A round of tokens after long caches that lie in memory, on a CPU: all of a cache, or chosen blocks."""
    if profile == "quick":
        pytest.skip("its caches take gigabytes: --profile full")
    given = block_decoding.decoder(block_decoding.LENGTH, batch)
    arms = [arm for arm in block_decoding.ARMS if arm != block_decoding.KERNEL or why_not_kernel(given.q) is None]

    def check() -> None:
        for arm in arms:
            block_decoding.check(arm)

    measure_arms(
        phase="decode",
        baseline="sdpa",
        arms={arm: partial(block_decoding.decode, arm, given) for arm in arms},
        check=check,
        axes={"length": block_decoding.LENGTH, "batch": batch},
        blocks=7,  # a round of dense attention takes seconds
        tokens=block_decoding.ROUND * batch,
    )


def bench_decode(
    measure_arms: Callable[..., Figures], keep: Callable[..., None], device: torch.device, profile: Profile
) -> None:
    """One token of one layer after a cache: multi-head, grouped, single-key and latent attention, absorbed."""
    length = LENGTHS[profile]
    forms = [form for form in decoding.FORMS if form != "latent_expanded"]  # many times slower: left to the study
    layers = {form: decoding.layer(form, length, device) for form in forms}

    def check() -> None:
        for form in layers:
            decoding.check(form, device)

    measure_arms(
        phase="decode",
        baseline="multi_head",
        arms={form: made.decode for form, made in layers.items()},
        check=check,
        axes={"length": length},
    )
    for form, made in layers.items():
        per_token = Measurement(metric="kv_bytes_per_token", value=made.cache.nbytes // length)
        keep(form, [per_token], baseline="multi_head", axes={"length": length})


def _costs(arm: str, phase: str, length: int, device: torch.device) -> list[Measurement]:
    """FLOPs, peak bytes and allocations of a call and, in training, the bytes that wait for backward."""
    call, given = PHASES[phase], attention.inputs(length, device)
    found = [flops(partial(call, arm, given))]
    found += peak_bytes(lambda: attention.inputs(length, device), partial(call, arm), device=device)
    if phase == "forward_backward":
        found.append(saved_bytes(partial(attention.forward, arm, given), [given.weight]))
    return found
