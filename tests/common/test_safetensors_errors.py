"""A disk that is full while safetensors writes is an OSError like any other."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from isologit.common.safetensors_errors import safetensors_as_os_errors


def test_what_the_system_said_is_an_os_error_with_its_number(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(SafetensorError):  # or the block would not be needed
            save_file({"x": np.zeros(4096, np.float32)}, file)
        with (
            pytest.raises(OSError, match=r"File too large: .*x\.safetensors") as raised,
            safetensors_as_os_errors(file),
        ):
            save_file({"x": np.zeros(4096, np.float32)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.errno == errno.EFBIG


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(SafetensorError, match="the header"), safetensors_as_os_errors(tmp_path):
        raise SafetensorError("the header is wrong")
