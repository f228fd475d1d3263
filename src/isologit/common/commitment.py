"""What an engine says of every token while it is timed, so that nothing can be computed again afterwards.

With each output token goes a fingerprint of `h`, the vector that the LM head reads, and a commitment to it. The judge
has its own `h` of the same tokens. Owns both definitions and what a fingerprint says about the logits; knows no HTTP.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

FINGERPRINT_SIZE = 16
"""Numbers of a fingerprint (float32, 64 bytes a token)."""

COMMITMENT_BYTES = 16
NONCE_BYTES = 32

_DOMAIN = b"isologit/fingerprint/1"


def fingerprint_matrix(nonce: bytes, hidden_size: int) -> np.ndarray:
    """float32 [16, hidden]: signs drawn from SHAKE-256 of the nonce, over sqrt(hidden), so that each row has norm 1."""
    count = FINGERPRINT_SIZE * hidden_size
    stream = hashlib.shake_256(_DOMAIN + nonce).digest(-(-count // 8))
    bits = np.unpackbits(np.frombuffer(stream, np.uint8), count=count).reshape(FINGERPRINT_SIZE, hidden_size)
    return ((1 - 2.0 * bits) / math.sqrt(hidden_size)).astype(np.float32)


def fingerprints(matrix: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """float32 [n, 16] of rows float32 [n, hidden]."""
    return np.asarray(hidden @ matrix.T, np.float32)


def commitment(nonce: bytes, request_id: str, index: int, row: np.ndarray) -> bytes:
    """The first 16 bytes of BLAKE2b over nonce, request, output index and the row's float32 bytes (little endian)."""
    name = request_id.encode()
    digest = hashlib.blake2b(digest_size=COMMITMENT_BYTES)
    digest.update(nonce + len(name).to_bytes(4, "little") + name + index.to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(row, "<f4").data)
    return digest.digest()


@dataclass(frozen=True)
class LogitScale:
    """How far logits move when `h` does: what turns a fingerprint's difference into an expected logit difference.

    For a difference d of `h` in a direction that has nothing to do with the LM head's weights, the logit of token j
    moves by about |w_j| * |d| / sqrt(hidden), normally distributed over j. So the largest of `vocab` moves is close to
    sqrt(2 ln vocab) times the root mean square. The squared norm of a fingerprint's difference times hidden / 16 is an
    unbiased estimate of |d|^2, since the signs are random.
    """

    rms_weight: float  # root mean square over tokens of |w_j|, the norm of an LM head row
    hidden_size: int
    vocab_size: int

    @classmethod
    def of(cls, head: np.ndarray) -> LogitScale:
        """head: float [vocab, hidden]."""
        squares = np.einsum("vh,vh->v", head, head, dtype=np.float64)
        return cls(float(np.sqrt(squares.mean())), head.shape[1], head.shape[0])

    def expected_max_difference(self, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        """float64 [n]: largest logit difference that two fingerprints [n, 16] speak of; infinite where not finite."""
        delta = ours.astype(np.float64) - theirs.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            distance = np.sqrt((delta**2).sum(axis=1) * self.hidden_size / FINGERPRINT_SIZE)
        rms = self.rms_weight * distance / math.sqrt(self.hidden_size)
        expected = rms * math.sqrt(2 * math.log(self.vocab_size))
        return np.asarray(np.where(np.isfinite(expected), expected, np.inf))
