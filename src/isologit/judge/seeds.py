"""A round's one seed: published as a hash before the round and in the clear after it; everything drawn comes from it.

Offline, `judge verify` derives prompts, order, nonces and secret positions from the seed again.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

import numpy as np

from isologit.common.commitment import NONCE_BYTES

_SEED_BYTES = 32


@dataclass(frozen=True)
class RoundSeed:
    """32 secret bytes. `published` is their SHA-256, which can be shown beforehand."""

    secret: bytes

    @classmethod
    def draw(cls) -> RoundSeed:
        """A fresh one from the system's source of randomness."""
        return cls(secrets.token_bytes(_SEED_BYTES))

    @classmethod
    def from_hex(cls, text: str) -> RoundSeed:
        """The seed that was published in the clear. Raises ValueError for anything but 64 hexadecimal digits."""
        secret = bytes.fromhex(text)
        if len(secret) != _SEED_BYTES:
            raise ValueError(f"a seed has {_SEED_BYTES} bytes, not {len(secret)}")
        return cls(secret)

    @property
    def published(self) -> str:
        """What is shown before the round."""
        return hashlib.sha256(self.secret).hexdigest()

    def derive(self, *names: str | int) -> bytes:
        """32 bytes for one purpose, which tell nothing about the others: BLAKE2b keyed by the seed."""
        label = "\x1f".join(str(name) for name in names).encode()
        return hashlib.blake2b(label, key=self.secret, digest_size=NONCE_BYTES).digest()

    def generator(self, *names: str | int) -> np.random.Generator:
        """Random numbers for one purpose."""
        return np.random.default_rng(int.from_bytes(self.derive(*names), "little"))
