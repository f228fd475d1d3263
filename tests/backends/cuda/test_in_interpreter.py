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
_STEPS = "prompt_at_once or only_wanted or not_a_number or memory_is"

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.parametrize(
    ("tests", "chosen", "least"),
    [
        ("tests/ops/test_providers.py", "cuda", 8),
        ("tests/backends/conformance/test_steps.py", f"cuda and gqa and ({_STEPS})", 4),
        ("tests/backends/cuda/test_triton_kernels.py", "", 1),
    ],
    ids=["every-kernel-against-its-definition", "steps-of-a-model", "kernels"],
)
def test_in_interpreter(tests: str, chosen: str, least: int) -> None:
    """At least so many tests ran, and all passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", tests, "-k", chosen]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert done.stdout.count("PASSED ") >= least, done.stdout[-3000:]
