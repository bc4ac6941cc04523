"""dsv3: a DeepSeek-V3-style training system, built so that each of its choices can be measured.

The rooms, in the direction of imports (a room imports from columns to its left only, never sideways):

    config | precision pipeline resilience data | layers augment native | attention moe | model | parallel | train |
    generate

Shapes are said once: as jaxtyping on public functions (`Float[Tensor, "B T D"]`) and as suffixes inside them
(`score_TE`). The letters:

    B  sequences in a batch             E  routed experts
    T  positions of the queries         K  experts that a token goes to, or keys that a query keeps
    S  positions of the keys            F  inner width of a feed-forward network or an expert
    N  tokens, B x T flattened          C  capacity: rows that an expert may take
    D  hidden size of the model         P  width of a head's queries and keys
    H  heads of the queries             R  width of a head's values
    G  heads of the keys and values     L  width of the latent that MLA caches (kv_lora_rank)
    V  vocabulary                       M  prediction depths of multi-token prediction

This file imports nothing: `import torch` costs seconds, and reading a config or a report should not pay for it.
"""
