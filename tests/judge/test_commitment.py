"""Fingerprints and commitments: what they are, what they find, and what they must not accuse."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from isologit.common.commitment import (
    COMMITMENT_BYTES,
    LogitScale,
    commitment,
    fingerprint_matrix,
    fingerprints,
)

NONCE = bytes(range(32))


def test_the_matrix_has_rows_of_norm_one_and_follows_from_the_nonce() -> None:
    matrix = fingerprint_matrix(NONCE, 100)
    assert matrix.shape == (16, 100)
    assert matrix.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=1), 1, rtol=1e-6)
    assert (fingerprint_matrix(NONCE, 100) == matrix).all()
    assert not (fingerprint_matrix(bytes(32), 100) == matrix).all()


def test_a_commitment_is_what_the_documentation_says() -> None:
    row = np.array([1.5, -2.25], np.float32)
    data = NONCE + (3).to_bytes(4, "little") + b"abc" + (7).to_bytes(8, "little") + row.tobytes()
    assert commitment(NONCE, "abc", 7, row) == hashlib.blake2b(data, digest_size=COMMITMENT_BYTES).digest()


@pytest.mark.parametrize("change", ["nonce", "request", "index", "value"])
def test_a_commitment_depends_on_everything(change: str) -> None:
    row = np.arange(4, dtype=np.float32)
    other = row.copy()
    other[2] = np.nextafter(other[2], np.float32(9))
    variants = {
        "nonce": (bytes(32), "r", 1, row),
        "request": (NONCE, "s", 1, row),
        "index": (NONCE, "r", 2, row),
        "value": (NONCE, "r", 1, other),
    }
    assert commitment(*variants[change]) != commitment(NONCE, "r", 1, row)


def test_the_expected_difference_is_close_to_the_true_one() -> None:
    """Over many random directions: within a factor of two for each, and within a few percent on average."""
    rng = np.random.default_rng(0)
    hidden, vocab = 256, 4000
    head = rng.normal(0, 0.1, (vocab, hidden)).astype(np.float32)
    rows = rng.normal(0, 1, (200, hidden)).astype(np.float32)
    moved = rows + rng.normal(0, 1e-3, rows.shape).astype(np.float32)
    true = np.abs(rows @ head.T - moved @ head.T).max(axis=1)
    matrix = fingerprint_matrix(NONCE, hidden)
    expected = LogitScale.of(head).expected_max_difference(fingerprints(matrix, moved), fingerprints(matrix, rows))
    ratio = expected / true
    assert ratio.min() > 0.5
    assert ratio.max() < 2.2
    assert abs(np.median(ratio) - 1) < 0.25


def test_what_is_not_finite_is_infinitely_far() -> None:
    scale = LogitScale(1.0, 16, 100)
    rows = np.zeros((2, 16), np.float32)
    bad = rows.copy()
    bad[0, 3] = np.nan
    bad[1, 3] = np.inf
    assert np.isinf(scale.expected_max_difference(bad, rows)).all()
