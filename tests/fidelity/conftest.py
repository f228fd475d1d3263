"""The tiny model's reference, built once."""

from __future__ import annotations

import pytest
from tests.fidelity.tiny_model import tiny_checkpoint

from isologit.fidelity import Reference


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference(tiny_checkpoint(), num_threads=1)
