"""The machine and the software a run happened on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from isologit import __version__

_PACKAGES = ("torch", "numba", "transformers", "numpy", "safetensors", "tokenizers", "sentencepiece")


def describe_environment() -> dict[str, Any]:
    """Hardware, operating system, versions, and the git revision when the package runs from a repository."""
    return {
        "cpu": _cpu_model(),
        "vector": _vector_instructions(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "git_revision": _git_revision(),
        "versions": {"isologit": __version__, **{name: _version(name) for name in _PACKAGES}},
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _vector_instructions() -> str | None:
    """The widest of the CPU's vector instructions that matter here, None where nothing says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    known = (("avx512_vnni", "AVX-512 VNNI"), ("avx512f", "AVX-512"), ("avx_vnni", "AVX-VNNI"), ("avx2", "AVX2"))
    return next((name for flag, name in known if flag in flags), None)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The commit the package's own source is at, with `+changes` when files differ from it."""
    source = Path(__file__).resolve().parents[1]
    try:
        if _git(source, "ls-files", "--error-unmatch", "__init__.py") is None:
            return None  # inside someone else's repository
        revision = _git(source, "rev-parse", "HEAD")
        changed = _git(source, "status", "--porcelain", "--untracked-files=no", ".")
    except OSError:
        return None
    return f"{revision}+changes" if revision and changed else revision


def _git(folder: Path, *arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
