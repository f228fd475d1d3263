"""What an exception becomes on standard error."""

from __future__ import annotations

import errno

import pytest

from isologit.cli.exits import Exit, reporting_errors


def _left_with(error: Exception, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    with pytest.raises(SystemExit) as left, reporting_errors():
        raise error
    return left.value.code, capsys.readouterr().err


def test_a_full_disk_is_one_line_that_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = _left_with(OSError(errno.ENOSPC, "No space left on device"), capsys)
    assert code == Exit.USER_ERROR
    assert said == "error: the disk is full; make room, then run the same command again\n"
    _, said = _left_with(OSError(errno.ENOSPC, "No space left on device", "/cache/kernels"), capsys)
    assert said == "error: the disk is full; make room (/cache/kernels), then run the same command again\n"


def test_a_file_that_may_not_grow_is_one_line_that_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = _left_with(OSError(errno.EFBIG, "File too large"), capsys)
    assert code == Exit.USER_ERROR
    assert said.startswith("error: a file became larger than may be (ulimit -f); raise the limit, then run")


def test_another_system_error_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = _left_with(OSError(errno.EIO, "Input/output error"), capsys)
    assert code == Exit.INTERNAL_ERROR
    assert "Traceback" in said
