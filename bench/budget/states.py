"""Bytes of parameters, gradients and optimizer state for each parameter, by recipe.

    recipe      weight  gradient  master  moments    per parameter
    float32        4        4        -      4 + 4    16     what dsv3.train keeps: torch.optim.AdamW on fp32 weights
    bfloat16       2        2        -      2 + 2     8     torch.optim.AdamW on a bf16 model
    mixed          2        2        4      4 + 4    16     bf16 with fp32 master weights: arXiv 1910.02054 section 3.1
    deepseek       2        4        4      2 + 2    14     master weights and gradients fp32, moments bf16:
                                                            arXiv 2412.19437 section 3.3.2
    sgd            2        2        -        -       4     plain gradient descent on a bf16 model

DeepSeek multiplies with fp8 copies of the weights; those are made when needed, and the bf16 copy is what a rank keeps.
Not counted: a step counter per parameter tensor, and the router's selection biases (4 B per expert and layer).
Activations of a recipe have the type of its weights.
"""

from dataclasses import dataclass

from dsv3.config.rules import require


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Bytes per parameter of each kind of state; `moments` has the bytes of each of the optimizer's moments."""

    name: str
    about: str
    weight: int
    gradient: int
    master: int
    moments: tuple[int, ...]

    @property
    def optimizer(self) -> int:
        """Bytes per parameter that only the optimizer reads: master weights and moments."""
        return self.master + sum(self.moments)


RECIPES = (
    Recipe(name="float32", about="AdamW on fp32 weights", weight=4, gradient=4, master=0, moments=(4, 4)),
    Recipe(name="bfloat16", about="AdamW on bf16 weights", weight=2, gradient=2, master=0, moments=(2, 2)),
    Recipe(name="mixed", about="AdamW on fp32 copies", weight=2, gradient=2, master=4, moments=(4, 4)),
    Recipe(name="deepseek", about="AdamW on fp32 copies, moments bf16", weight=2, gradient=4, master=4, moments=(2, 2)),
    Recipe(name="sgd", about="plain gradient descent on bf16 weights", weight=2, gradient=2, master=0, moments=()),
)


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: for a name that is none.
    """
    names = [known.name for known in RECIPES]
    require(name in names, "recipe", name, f"must be one of {', '.join(names)}", "pick one of these")
    return RECIPES[names.index(name)]
