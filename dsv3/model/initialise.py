"""Initial weights from random streams that are keyed by name.

Matrices are normal with standard deviation `initializer_range` and mean 0, norm weights 1, biases 0 (DeepSeek-V3,
arXiv 2412.19437 section 4.2, has 0.006; the default of this family's configs is 0.02), the embedding `embedding_range`
where that is set. A parameter's stream is keyed by (seed, purpose, name), so a model that gains or loses a part keeps
every other number, and two arms of a study start from the same weights wherever they share them.
"""

from hashlib import sha256

import torch
from torch import Tensor, nn

PURPOSE = "initialise"
EMBEDDING = "embed_tokens.weight"


def stream(seed: int, purpose: str, name: str) -> torch.Generator:
    """A CPU generator for one purpose and name; streams of different keys are independent."""
    key = sha256(f"{seed}/{purpose}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))


@torch.no_grad()
def initialise(module: nn.Module, *, std: float, embedding_std: float | None, seed: int) -> None:
    """Fill every parameter of `module` in place; numbers are drawn in fp32 on the CPU, so they are the same on every
    device. Meta tensors stay.
    """
    for name, parameter in module.named_parameters():
        if not parameter.is_meta:
            own = embedding_std if name == EMBEDDING else None
            parameter.copy_(_values(name, parameter, std if own is None else own, seed))


def _values(name: str, parameter: Tensor, std: float, seed: int) -> Tensor:
    if parameter.ndim == 1:
        return torch.zeros(parameter.shape) if name.endswith("bias") else torch.ones(parameter.shape)
    return torch.empty(parameter.shape, device="cpu").normal_(0.0, std, generator=stream(seed, PURPOSE, name))
