"""The ledger of claims: what a well-known article and DeepSeek's papers say, in our words, and the rule by which
records decide it.

The ledger is claims.toml; its head says what each field means. A claim is answered by a study, or is pending with the
reason, or is ruled out from the start (nothing that runs here could decide it). `ablations.verdicts` turns records into
verdicts.
"""

import tomllib
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from dsv3.config.rules import require

LEDGER = Path(__file__).with_name("claims.toml")


class Outcome(StrEnum):
    """What may be said of a claim."""

    HOLDS = "holds here"
    FAILS = "does not hold here"
    ILL_POSED = "ill-posed"
    UNDECIDABLE = "not decidable here"
    PENDING = "pending"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """An outcome, the sentence that answers the claim, and the estimate behind it where there is one (`low`, `high` at
    95%).
    """

    outcome: Outcome
    answer: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One row of the ledger; the head of claims.toml says what each field means."""

    id: str
    section: str
    words: str
    value: float | None = None
    unit: str = ""
    estimand: str
    scope: str
    margin: float | None = None
    study: str | None = None
    pending: str | None = None
    ruled: str | None = None
    why: str | None = None
    deepseek: str
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("id", "section", "words", "estimand", "scope", "deepseek"):
            text = getattr(self, name)
            require(
                isinstance(text, str) and text.strip() != "", f"{self.id}.{name}", text, "must be text", "fill it in"
            )
        given = [name for name in ("study", "pending", "ruled") if getattr(self, name) is not None]
        require(
            len(given) == 1,
            f"{self.id}",
            given,
            "must have exactly one of study, pending, ruled",
            "say how it is answered",
        )
        outcomes = (Outcome.ILL_POSED, Outcome.UNDECIDABLE)
        require(
            self.ruled in (None, *outcomes),
            f"{self.id}.ruled",
            self.ruled,
            f"must be one of {', '.join(outcomes)}",
            "pick one",
        )
        require(
            (self.ruled is None) == (self.why is None),
            f"{self.id}.why",
            self.why,
            "belongs to ruled, and ruled to it",
            "give both",
        )
        judged = self.study is None or self.value is None or self.margin is not None
        require(
            judged,
            f"{self.id}.margin",
            self.margin,
            "must be set where a study judges a value",
            "set it before the first run",
        )

    @property
    def least(self) -> float:
        """The smallest estimate with which a claim of "at least" still holds: value - margin."""
        return self._value() - self._margin()

    @property
    def most(self) -> float:
        """The largest estimate with which a claim of "at most" still holds: value + margin."""
        return self._value() + self._margin()

    def _value(self) -> float:
        assert self.value is not None, f"{self.id} claims no value"
        return self.value

    def _margin(self) -> float:
        assert self.margin is not None, f"{self.id} has no margin"
        return self.margin


@cache
def ledger() -> dict[str, Claim]:
    """The claims of claims.toml by id, in its order."""
    return read(LEDGER.read_text())


def read(text: str) -> dict[str, Claim]:
    """The claims in the text of a ledger.

    Raises:
        ValueError: text that is not TOML, an unknown, missing or bad field, or an id that stands twice.
    """
    try:
        rows = tomllib.loads(text)["claim"]
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise ValueError(f"the ledger is no TOML with [[claim]] tables ({error})") from error
    claims: dict[str, Claim] = {}
    for row in rows:
        claim = _claim(row)
        require(
            claim.id not in claims, "id", claim.id, "must stand once in the ledger", "give each claim an id of its own"
        )
        claims[claim.id] = claim
    return claims


def _claim(row: dict[str, Any]) -> Claim:
    known = {field.name for field in fields(Claim)}
    name = row.get("id", "a claim without id")
    for key in row:
        require(
            key in known, f"{name}.{key}", row[key], f"must be one of {', '.join(sorted(known))}", "correct the name"
        )
    try:
        return Claim(**row | {"sources": tuple(row.get("sources", ()))})
    except TypeError as error:
        raise ValueError(f"{name}: {str(error).removeprefix('Claim.__init__() ')}; fill it in") from error
