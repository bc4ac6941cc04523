"""Generators of plans: each takes the number of ranks and of microbatches and returns a `Plan`."""

from dsv3.pipeline.schedules.dual_pipe import dual_pipe, dual_pipe_v
from dsv3.pipeline.schedules.gpipe import gpipe
from dsv3.pipeline.schedules.one_f_one_b import interleaved_one_f_one_b, one_f_one_b, zero_bubble_h1

__all__ = ["dual_pipe", "dual_pipe_v", "gpipe", "interleaved_one_f_one_b", "one_f_one_b", "zero_bubble_h1"]
