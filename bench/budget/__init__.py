"""True-size budgets: what a training step of a model costs before anyone owns the machines for it.

    python -m bench.budget --preset deepseek_v3 --pp 16 --ep 64 --dp 128 --zero 1 --microbatches 120
    python -m bench.budget --hf-config DIR                      config.json of any model of this family

Two independent ways to the same figures. By arithmetic (no torch): bytes of states, of activations kept for backward,
FLOPs, bytes sent, the fullest rank of a split. By a trace: the real model on fake tensors, whole, on one device, and as
one of several replicas that average their gradients. `agreement` holds the two together, and both against the allocator
at sizes that fit. Other splits, ZeRO included, are arithmetic alone.

states.py       parameters, gradients, optimizer state, by recipe of number formats
activations.py  what forward keeps for backward, by module and recomputation policy; selections.py: lists of keys
splits.py       which parameters a rank holds under tensor, pipeline, expert and data parallelism
working.py      what backward takes for a while; shares.py: all that a rank holds at its peak
traffic.py      the bytes that a rank sends
published.py    published figures beside ours; wall.py: hours and prices of a run
traced.py       the trace (live.py follows its storages); allocator.py: the same step on real memory
"""
