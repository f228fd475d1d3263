"""The Triton kernels under Triton's interpreter, which must be turned on before Triton is imported: in a process of its
own. Small shapes; where there is a GPU, the same tests run on it without this.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TESTS = (
    "tests/ops/test_providers.py",  # every kernel against its definition
    "tests/backends/cuda/test_triton_kernels.py",
    "tests/backends/cuda/test_numerics.py",
    "tests/backends/conformance/test_steps.py",  # steps of a small model
)
STEPS = "gqa and (only_wanted or last_step or not_a_number or memory)"
CHOSEN = f"cuda and (providers or triton_kernels or numerics or ({STEPS}))"


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_in_interpreter() -> None:
    """All pass, and of every file some ran."""
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *TESTS, "-k", CHOSEN]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    said = done.stdout[-3000:] + done.stderr[-1000:]
    assert done.returncode == 0, said
    for file, least in zip(TESTS, (8, 12, 8, 4), strict=True):
        assert done.stdout.count(f"PASSED {file}") >= least, said
