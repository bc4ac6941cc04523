"""Speeds from the time of a call: tokens per second, share of a measured ceiling, share of a card's stated peak."""

from dataclasses import replace

import torch

from bench.measurement import Measurement
from bench.peaks import peak_flops


def rate(seconds: Measurement, metric: str, amount: float) -> Measurement:
    """`amount` per call over the call's seconds, as `metric`; the interval turns round with the quotient."""
    interval = None if seconds.interval is None else (amount / seconds.interval[1], amount / seconds.interval[0])
    samples = None if seconds.samples is None else tuple(amount / sample for sample in seconds.samples)
    return replace(seconds, metric=metric, value=amount / seconds.value, interval=interval, samples=samples)


def model_flops_utilisation(wall_seconds: Measurement, flops: float, dtype: torch.dtype) -> Measurement | str:
    """Operations per second over the peak that this GPU's vendor states, or why there is no such share."""
    card, number_format = torch.cuda.get_device_name(), format_name(dtype)
    peak = peak_flops(card, number_format)
    if peak is None:
        return f"pending: peak unknown for {card} in {number_format}; add it to bench/peaks.toml with its source"
    return rate(wall_seconds, "mfu", flops / peak)


def format_name(dtype: torch.dtype) -> str:
    """How peaks.toml calls the format in which a GPU multiplies tensors of this type: fp32 may run as tf32."""
    if dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return str(dtype).removeprefix("torch.")
