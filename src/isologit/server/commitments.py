"""`isologit serve --commit`: streamed tokens carry a fingerprint of what the LM head read, and a commitment to it.

Owns a round's nonce and the rows that may have to be revealed. docs/judge.md has the protocol.
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from isologit.common.commitment import NONCE_BYTES, commitment, fingerprint_matrix, fingerprints
from isologit.errors import RequestError

REQUEST_ID_HEADER = "x-request-id"
_IN_MEMORY_BYTES = 256 << 20
_MOST_POSITIONS = 100_000


class Commitments:
    """Of one round at a time; without one nothing is committed to. hidden_size: numbers in a row."""

    def __init__(self, hidden_size: int) -> None:
        self.hidden_size = hidden_size
        self._row_bytes = 4 * hidden_size
        self._nonce: bytes | None = None
        self._matrix = np.empty((0, hidden_size), np.float32)
        self._places: dict[tuple[str, int], int] = {}
        self._rows = tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES)  # noqa: SIM115 - as long as this object lives

    def begin(self, nonce: bytes) -> None:
        """A new round: rows of the one before are forgotten. Raises RequestError for a nonce of another length."""
        if len(nonce) != NONCE_BYTES:
            raise RequestError(f"a nonce has {NONCE_BYTES} bytes, not {len(nonce)}")
        self._nonce, self._matrix = nonce, fingerprint_matrix(nonce, self.hidden_size)
        self._places.clear()
        self._rows.seek(0)
        self._rows.truncate()

    def commit(self, request_id: str, first_index: int, hidden: np.ndarray) -> list[dict[str, str]] | None:
        """The `commit` member for rows float32 [n, hidden] of consecutive output tokens; None outside of a round."""
        if self._nonce is None:
            return None
        found = []
        self._rows.seek(0, 2)
        for i, (row, fingerprint) in enumerate(zip(hidden, fingerprints(self._matrix, hidden), strict=True)):
            index = first_index + i
            self._places[request_id, index] = len(self._places)
            self._rows.write(np.ascontiguousarray(row, "<f4").data)
            promise = commitment(self._nonce, request_id, index, row)
            found.append({"fingerprint": _text(fingerprint.astype("<f4").tobytes()), "commitment": _text(promise)})
        return found

    def reveal(self, positions: Sequence[tuple[str, int]]) -> list[str]:
        """Rows in base64. Raises RequestError for a token that was not committed to in this round."""
        rows = []
        for request_id, index in positions:
            place = self._places.get((request_id, index))
            if place is None:
                raise RequestError(f"token {index} of request {request_id!r} was not committed to in this round")
            self._rows.seek(place * self._row_bytes)
            rows.append(_text(self._rows.read(self._row_bytes)))
        return rows


class Round(BaseModel):
    """Body of `/judge/round`: 32 bytes in hexadecimal."""

    model_config = ConfigDict(extra="forbid")
    nonce: str = Field(pattern=r"^[0-9a-fA-F]*$", max_length=2 * NONCE_BYTES)


class Position(BaseModel):
    """One output token of a request, from 0."""

    model_config = ConfigDict(extra="forbid")
    request_id: str
    index: int = Field(ge=0)


class Reveal(BaseModel):
    """Body of `/judge/reveal`."""

    model_config = ConfigDict(extra="forbid")
    positions: list[Position] = Field(max_length=_MOST_POSITIONS)


def router(commitments: Commitments) -> APIRouter:
    """What a judge posts before and after the load."""
    routes = APIRouter(tags=["judge"])

    @routes.post("/judge/round")
    async def begin(body: Round) -> dict[str, Any]:
        commitments.begin(bytes.fromhex(body.nonce) if len(body.nonce) % 2 == 0 else b"")
        return {"hidden_size": commitments.hidden_size}

    @routes.post("/judge/reveal")
    async def reveal(body: Reveal) -> dict[str, Any]:
        rows = commitments.reveal([(position.request_id, position.index) for position in body.positions])
        shown = zip(body.positions, rows, strict=True)
        return {"rows": [{**position.model_dump(), "hidden": row} for position, row in shown]}

    return routes


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
