"""`ISOLOGIT_VECTOR_WIDTH`: kernels of a narrower CPU on this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from isologit.backends.cpu.simd import VECTOR_WIDTH, host_vector_width, vector_width
from isologit.errors import ConfigError

ROOT = Path(__file__).parents[3]
AVX2 = 8


def test_the_widest_unless_told() -> None:
    assert [vector_width("", widest) for widest in (4, 8, 16)] == [4, 8, 16]
    assert vector_width("8", 16) == 8


@pytest.mark.parametrize("wish", ["16", "6", "eight", "-4"])
def test_what_the_cpu_does_not_have_is_refused(wish: str) -> None:
    with pytest.raises(ConfigError, match=r"can be 4, 8, or not set"):
        vector_width(wish, 8)


def with_width(width: int, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ISOLOGIT_VECTOR_WIDTH": str(width)}
    command = (sys.executable, *command)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


def test_compiled_kernels_of_two_widths_lie_apart() -> None:
    code = "import numba, isologit.backends.cpu.simd as s; print(s.VECTOR_WIDTH, numba.config.CACHE_DIR)"
    widths, folders = zip(*(with_width(width, "-c", code).stdout.split() for width in (4, VECTOR_WIDTH)), strict=True)
    assert widths == ("4", str(VECTOR_WIDTH))
    assert (folders[0] == folders[1]) == (VECTOR_WIDTH == 4)


@pytest.mark.slow
@pytest.mark.skipif(host_vector_width() <= AVX2, reason="this CPU is not wider than AVX2, so other tests are enough")
def test_kernels_for_avx2_agree_with_their_definitions() -> None:
    """Tiles, panels and blocks of keys have other sizes there."""
    tests = ("tests/backends/cpu/test_kernels.py", "tests/ops", "tests/backends/conformance/test_steps.py")
    done = with_width(AVX2, "-m", "pytest", "-q", "-x", "-k", "not torch and not triton and not cuda", *tests)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
