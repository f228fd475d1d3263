"""Whether something counts, and why not: the one form of it in every file and on every screen. Knows no rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["VALID", "INVALID", "NOT CERTIFIED"]


@dataclass(frozen=True)
class Reason:
    """Why something does not count: `code` for programs, `message`, one sentence, for people."""

    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


@dataclass(frozen=True)
class Verdict:
    """VALID: it counts. INVALID: it does not. NOT CERTIFIED: nothing is wrong but the measuring itself.

    NOTE: VALID has no reasons, anything else has at least one.
    """

    status: Status
    reasons: tuple[Reason, ...] = ()

    def __post_init__(self) -> None:
        assert (self.status == "VALID") == (not self.reasons)

    @classmethod
    def of(cls, reasons: Sequence[Reason]) -> Verdict:
        """INVALID as soon as there is one reason."""
        return cls("INVALID" if reasons else "VALID", tuple(reasons))

    @property
    def valid(self) -> bool:
        """Whether it counts."""
        return self.status == "VALID"

    def to_dict(self) -> dict[str, Any]:
        """Keys `verdict` and `reasons`, each with `code` and `message`."""
        return {"verdict": self.status, "reasons": [asdict(reason) for reason in self.reasons]}
