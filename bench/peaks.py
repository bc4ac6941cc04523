"""Peak operations per second of a card by its name, from the committed table peaks.toml."""

import tomllib
from pathlib import Path

TABLE = Path(__file__).parent / "peaks.toml"


def peak_flops(card: str, number_format: str) -> float | None:
    """Dense operations per second of the card in that format (float32, tf32, bfloat16, float16, float8), if known."""
    for row in tomllib.loads(TABLE.read_text())["card"]:
        if row["name"] == card and number_format in row["peak"]:
            return float(row["peak"][number_format]) * 1e12
    return None
