"""True-size budgets: what a training step of a model costs before anyone owns the machines for it.

    python -m bench.budget --preset deepseek_v3 --pp 16 --ep 64 --dp 128 --zero 1
    python -m bench.budget --hf-config DIR                      config.json of any model of this family

Two independent ways to the same figures. By arithmetic (no torch): bytes of states, of activations kept for backward,
FLOPs, bytes sent, the fullest rank of a split. By a trace: the real model on fake tensors, whole, one device and data
parallel. `agreement` holds the two together, and both against the allocator at sizes that fit.

states.py       parameters, gradients, optimizer state, by recipe of number formats
activations.py  what forward keeps for backward, by module and recomputation policy
splits.py       a rank's share under tensor, pipeline, expert and data parallelism
traffic.py      the bytes that a rank sends
published.py    published figures beside ours; wall.py: hours and prices of a run
traced.py       the trace (live.py follows its storages); allocator.py: the same step on real memory
"""
