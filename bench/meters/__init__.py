"""Meters: each takes what is to be measured as arguments and returns Measurements; none leaves a hook behind.

paired   time of interleaved arms      saved   bytes kept for backward     load    balance of a routing
memory   peak bytes, allocations       flops   floating-point operations   energy  joules and clocks by NVML
ceiling  what the machine can do at most
"""
