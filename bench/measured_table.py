"""Tables that a command measures and that are committed, for code to read its choices from: entries `[[measured]]`."""

from collections.abc import Mapping, Sequence
from pathlib import Path


def write(path: Path, head: str, table: Sequence[Mapping[str, object]]) -> None:
    """The table as it is committed, `head` first."""
    parts = [head]
    for row in table:
        parts.append("\n[[measured]]\n" + "".join(f"{name} = {_toml(value)}\n" for name, value in row.items()))
    path.write_text("".join(parts))


def _toml(value: object) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    return f"[{', '.join(map(str, value))}]" if isinstance(value, (list, tuple)) else str(value)
