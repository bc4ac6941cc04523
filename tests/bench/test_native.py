"""Which speeds are timed: only those of formats that the machine multiplies itself."""

import pytest

from bench import native
from bench.native import why_no_speed
from dsv3.config import BFloat16, Float8Block, Float16, Float32, Precision


@pytest.mark.parametrize(
    "flags, precision, timed",
    [
        ([], Float32(), True),
        (["avx2", "avx512f"], BFloat16(), False),
        (["avx512f", "avx512_bf16"], BFloat16(), True),
        (["amx_bf16"], BFloat16(), True),
        (["asimd", "bf16"], BFloat16(), True),
        (["avx512_bf16"], Float16(), False),
        (["avx512_fp16"], Float16(), True),
        (["asimdhp"], Float16(), True),
        (["avx512_bf16", "avx512_fp16", "amx_bf16"], Float8Block(), False),
    ],
)
def test_a_processor_times_what_its_flags_promise(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], precision: Precision, timed: bool
) -> None:
    monkeypatch.setattr(native, "instruction_sets", lambda: flags)
    assert (why_no_speed(precision, "cpu") is None) == timed


def test_the_reason_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "instruction_sets", list)
    assert why_no_speed(Float16(), "cpu") == (
        "this processor has no fp16 products (none of avx512_fp16, amx_fp16, asimdhp): torch converts"
    )


def test_fp8_has_no_speed_anywhere_because_it_is_emulated() -> None:
    reason = why_no_speed(Float8Block(), "cuda")
    assert reason is not None
    assert "emulated" in reason
