"""Numba's compiler, told which CPU to make code for. Whoever compiles takes `njit` from here.

Numba asks once in a process what the CPU has, when the first function is decorated. `ISOLOGIT_VECTOR_WIDTH` must have
been heard by then, or kernels of eight lanes get the registers and masks that AVX-512 lends to shorter vectors.
"""

from __future__ import annotations

import os

import llvmlite.binding as llvm
import numba
from numba import njit
from numba.core.registry import cpu_target

from isologit.errors import ConfigError

__all__ = ["FEATURES", "VECTOR_WIDTH", "host_vector_width", "narrower", "njit", "vector_width"]

_WIDTH_VARIABLE = "ISOLOGIT_VECTOR_WIDTH"


def host_vector_width() -> int:
    """float32 lanes of the widest vector register of this CPU."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16
    return 8 if features.get("avx2") else 4


def vector_width(wish: str, widest: int) -> int:
    """float32 lanes that kernels are made for: the widest, or fewer if `wish` is not empty.

    Raises ConfigError when `wish` is no width that a CPU with registers of `widest` lanes has.
    """
    widths = [width for width in (4, 8, 16) if width <= widest]
    if wish and wish not in map(str, widths):
        raise ConfigError(f'{_WIDTH_VARIABLE} is "{wish}"; here it can be {", ".join(map(str, widths))}, or not set')
    return int(wish or widest)


def narrower(features: dict[str, bool], width: int) -> dict[str, bool]:
    """Features of a CPU like the one with these, but with vectors of `width` lanes and nothing that came later.

    That is more than shorter vectors: AVX-512 has twice the registers, masks and operands that are spread from memory
    at every width, and products of bytes came to CPUs without it only as AVX-VNNI.
    """
    later = ("avx512", "avx10", "amx", "avxvnni", "avxifma", "avxneconvert", *(("avx2",) if width < 8 else ()))
    return {name: has and not name.startswith(later) for name, has in features.items()}


def _compile_for(width: int, features: dict[str, bool]) -> None:
    """Have Numba make code that a CPU of this width could run: with its features, and scheduled as for one.

    Raises ConfigError when Numba was used before and has made up its mind.
    """
    numba.config.CPU_NAME = {4: "x86-64-v2", 8: "znver3"}[width]
    numba.config.CPU_FEATURES = ",".join(f"{'+' if has else '-'}{name}" for name, has in sorted(features.items()))
    _, _, made_for = cpu_target.target_context.codegen().magic_tuple()
    if made_for != numba.config.CPU_FEATURES:
        raise ConfigError(
            f"{_WIDTH_VARIABLE} comes too late: this process used Numba before isologit; import isologit.LLM first"
        )


VECTOR_WIDTH = vector_width(os.environ.get(_WIDTH_VARIABLE, ""), host_vector_width())
FEATURES = dict(llvm.get_host_cpu_features())  # of the CPU that kernels are made for
if host_vector_width() > VECTOR_WIDTH:
    FEATURES = narrower(FEATURES, VECTOR_WIDTH)
    _compile_for(VECTOR_WIDTH, FEATURES)
