"""Where two nested tables of figures are not equal."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """A figure that is not what was expected; None where one of the two has no such figure."""

    where: str
    expected: float | None
    found: float | None

    @property
    def dearer(self) -> bool:
        """Whether it costs more than expected; a figure that only one side has counts as zero on the other."""
        return (self.found or 0) > (self.expected or 0)

    def __str__(self) -> str:
        both = self.expected is not None and self.found is not None
        change = f" ({(self.found or 0) - (self.expected or 0):+})" if both else ""
        return f"{self.where}: expected {self.expected}, found {self.found}{change}"


def differences(expected: Figures, found: Figures, path: str = "") -> Iterator[Difference]:
    """Each figure that is not equal, gone, or new."""
    for name in sorted(expected.keys() | found.keys()):
        where = f"{path}.{name}" if path else name
        old, new = expected.get(name), found.get(name)
        if isinstance(old, dict) or isinstance(new, dict):
            yield from differences(old or {}, new or {}, where)
        elif old != new or (name in expected) != (name in found):
            yield Difference(where, old, new)


def size(figures: Figures) -> int:
    """How many figures a table holds."""
    return sum(size(value) if isinstance(value, dict) else 1 for value in figures.values())
