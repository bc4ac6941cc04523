"""Which precisions this machine multiplies in its own instructions. The time of any other says nothing about it.

torch computes in every format everywhere: what the processor lacks is converted, multiplied in fp32 and converted back.
Numerics of such a run are as good as any; its speed is that of the conversion.
"""

from typing import assert_never

from bench.fingerprint import instruction_sets
from dsv3.config import BFloat16, Float8Block, Float16, Float32, Precision

_BF16 = ("avx512_bf16", "amx_bf16", "bf16")
_FP16 = ("avx512_fp16", "amx_fp16", "asimdhp")
_BF16_CAPABILITY = (8, 0)  # Ampere; older cards widen bf16 to fp32


def why_no_speed(precision: Precision, device: str) -> str | None:
    """None where the device multiplies in this precision; otherwise the reason why a speed would mislead."""
    match precision:
        case Float32():
            return None
        case BFloat16():
            return _why_no_bf16_on_gpu() if device == "cuda" else _why_not_on_cpu("bf16", _BF16)
        case Float16():
            return None if device == "cuda" else _why_not_on_cpu("fp16", _FP16)
        case Float8Block():
            return "fp8 is emulated: codes are multiplied out to fp32 before the product"
        case _:
            assert_never(precision)


def _why_not_on_cpu(name: str, any_of: tuple[str, ...]) -> str | None:
    if set(any_of) & set(instruction_sets()):
        return None
    return f"this processor has no {name} products (none of {', '.join(any_of)}): torch converts"


def _why_no_bf16_on_gpu() -> str | None:
    import torch

    if torch.cuda.get_device_capability() >= _BF16_CAPABILITY:
        return None
    return f"{torch.cuda.get_device_name()} is older than compute capability 8.0: bf16 is widened to fp32"
