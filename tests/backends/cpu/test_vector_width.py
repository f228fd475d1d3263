"""`ISOLOGIT_VECTOR_WIDTH`: kernels of a narrower CPU on this one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from isologit.backends.cpu.simd import byte_products
from isologit.common.compiler import VECTOR_WIDTH, host_vector_width, narrower, vector_width
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


_REGISTERS = """
import re
import numpy as np
from numba import njit
from isologit.backends.cpu.tiles import bound_tile

@njit
def call(x, w, columns, take, factors, tops):
    bound_tile(x, 0, 12, w, 0, 8, 0, 0, columns, 0, take, factors, 0, tops, 0, 6)

call.compile("void(int32[::1], int32[::1], float32[::1], int32[::1], float32[:, ::1], float32[::1])")
(code,) = call.inspect_asm().values()
print(*sorted(set(re.findall(r"%([xyz]mm|k)([0-9]+)", code))))
"""


@pytest.mark.skipif(host_vector_width() <= AVX2, reason="this CPU has nothing to keep from")
@pytest.mark.parametrize("width", [AVX2, host_vector_width()])
def test_a_narrower_cpu_has_fewer_registers_and_no_masks(width: int) -> None:
    """AVX-512 lends its 32 registers and masks to shorter vectors too, which would flatter them."""
    done = with_width(width, "-c", _REGISTERS)
    assert done.returncode == 0, done.stderr
    found = {(kind, int(number)) for kind, number in re.findall(r"'([xyzm]+|k)', '(\d+)'", done.stdout)}
    assert ("ymm", 5) in found
    beyond = [register for register in found if register[0] in ("zmm", "k") or register[1] > 15]
    assert bool(beyond) == (width > AVX2)


_FEATURES = """
from isologit.checkpoints import dummy
from isologit import LLM
from numba.core.registry import cpu_target

LLM().close()
triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
print(*(feature for feature in features.split(",") if feature.startswith("+avx")))
"""


@pytest.mark.skipif(host_vector_width() <= AVX2, reason="this CPU has nothing to keep from")
@pytest.mark.parametrize("width", [AVX2, host_vector_width()])
def test_nothing_is_compiled_before_the_width_is_known(width: int) -> None:
    """Numba asks what the CPU has when the first function is decorated: one of random weights, not a kernel."""
    done = with_width(width, "-c", _FEATURES)
    assert done.returncode == 0, done.stderr
    features = done.stdout.split()
    assert "+avx2" in features
    assert any(name.startswith("+avx512") for name in features) == (width > AVX2)


def test_only_one_module_takes_njit_from_numba() -> None:
    sources = sorted((ROOT / "src").rglob("*.py"))
    direct = [
        path.name for path in sources if re.search(r"^from numba import .*njit|numba\.njit", path.read_text(), re.M)
    ]
    assert direct == ["compiler.py"]


@pytest.mark.skipif(host_vector_width() <= AVX2, reason="this CPU has nothing to keep from")
def test_a_width_that_comes_too_late_is_refused() -> None:
    done = with_width(AVX2, "-c", "from numba import njit; njit(lambda: 1)(); from isologit import LLM")
    assert "ISOLOGIT_VECTOR_WIDTH comes too late" in done.stderr


def test_features_of_a_narrower_cpu() -> None:
    host = {"avx2": True, "fma": True, "sse4a": False, "avx512f": True, "avx512vnni": True, "avxvnni": True}
    assert [byte_products(host, width) for width in (4, 8, 16)] == [None, "fours", "fours"]
    assert byte_products({**host, "avx512vnni": False, "avx512bw": True}, 16) == "pairs"
    plain = narrower(host, AVX2)
    assert {name for name, has in plain.items() if has} == {"avx2", "fma"}
    assert byte_products(plain, AVX2) == "pairs"
    assert {name for name, has in narrower(host, 4).items() if has} == {"fma"}


@pytest.mark.slow
@pytest.mark.skipif(host_vector_width() <= AVX2, reason="this CPU is not wider than AVX2, so other tests are enough")
def test_kernels_for_avx2_agree_with_their_definitions() -> None:
    """Tiles, panels and blocks of keys have other sizes there."""
    tests = (
        "tests/backends/cpu/test_kernels.py",
        "tests/backends/cpu/test_shortlist.py",
        "tests/ops",
        "tests/backends/conformance/test_steps.py",
    )
    done = with_width(AVX2, "-m", "pytest", "-q", "-x", "-k", "not torch and not triton and not cuda", *tests)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
