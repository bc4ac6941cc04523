"""The layers every block is made of: RMSNorm, rotary positions with YaRN, the SwiGLU feed-forward network."""

from dsv3.layers.norm import RMSNorm
from dsv3.layers.rope import frequencies, rotate, rotate_halves, softmax_mscale
from dsv3.layers.swiglu import SwiGLU, swiglu

__all__ = ["RMSNorm", "SwiGLU", "frequencies", "rotate", "rotate_halves", "softmax_mscale", "swiglu"]
