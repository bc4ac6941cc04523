"""What shapes must be: in the same words for attention, for what selects its keys, and for modules.

Sizes alone are looked at, so that a device is not waited for.
"""

from torch import Tensor

from dsv3.config.rules import require


def check(q: Tensor, k: Tensor, v: Tensor | None = None) -> None:
    """Refuse queries, keys and values that do not fit each other, and empty ones; a search has no values.

    Raises:
        ValueError: with the shapes.
    """
    given, wanted = {"q": q, "k": k}, "[B,H,T,P] and [B,G,S,P]"
    if v is not None:
        given, wanted = {"q": q, "k": k, "v": v}, "[B,H,T,P], [B,G,S,P] and [B,G,S,R]"
    for letter, tensor in given.items():
        check_axes(letter, tensor, "batch", "heads", "positions", "width")
    shapes = tuple(tuple(tensor.shape) for tensor in given.values())
    name = "(q.shape, k.shape)" if v is None else "(q.shape, k.shape, v.shape)"
    (batch, heads, queries, width), keys, values = shapes[0], shapes[1], shapes[-1]
    same = keys[::3] == (batch, width) and keys[:3] == values[:3]
    require(same, name, shapes, "batch, keys and widths must agree", f"pass {wanted}")
    divides = heads % keys[1] == 0
    require(divides, name, shapes, "key-value heads must divide the query heads", "group the heads evenly")
    rule = "queries are the last T of S positions, so T must be at most S"
    require(queries <= keys[2], name, shapes, rule, "pass the keys of all positions")


def check_axes(name: str, tensor: Tensor, *axes: str) -> None:
    """Refuse another number of axes than are named, and an empty one.

    Raises:
        ValueError: with the shape.
    """
    name, shape = f"{name}.shape", tuple(tensor.shape)
    require(len(shape) == len(axes), name, shape, f"must be [{', '.join(axes)}]", "pass these axes")
    require(0 not in shape, name, shape, "must not be empty", "make each axis at least 1")
