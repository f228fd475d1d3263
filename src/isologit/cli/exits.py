"""Exit codes, and how an exception becomes one line on standard error. Loads nothing heavy."""

from __future__ import annotations

import errno
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
from typing import NoReturn

from isologit.errors import IsologitError

_NO_ROOM = {
    errno.ENOSPC: "the disk is full; make room",
    errno.EDQUOT: "the disk quota is used up; make room",
    errno.EFBIG: "a file became larger than may be (ulimit -f); raise the limit",
}


class Exit(IntEnum):
    """What the process says to whoever started it; docs/cli.md has the same table."""

    OK = 0
    INVALID = 1
    USER_ERROR = 2
    SOME_FAILED = 3
    INTERNAL_ERROR = 70
    INTERRUPTED = 130


@contextmanager
def reporting_errors(*, as_json: bool = False) -> Iterator[None]:
    """Turn expected errors and interruptions into one line and an exit code; a defect keeps its traceback.

    as_json: standard output also gets one object that says what went wrong.
    """
    try:
        yield
    except IsologitError as error:
        leave(Exit.USER_ERROR, f"error: {_one_line(error)}", as_json=as_json)
    except KeyboardInterrupt:
        leave(Exit.INTERRUPTED, "interrupted", as_json=as_json)
    except (Exception, MemoryError) as error:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            where = f" ({error.filename})" if error.filename else ""
            line = f"error: {_NO_ROOM[error.errno]}{where}, then run the same command again"
            leave(Exit.USER_ERROR, line, as_json=as_json)
        import traceback

        traceback.print_exc()
        message = f"internal error: {type(error).__name__}: {_one_line(error)}; please report it with the lines above"
        leave(Exit.INTERNAL_ERROR, message, as_json=as_json)


def leave(code: Exit, line: str, *, as_json: bool) -> NoReturn:
    """Say one line and end the process."""
    print(line, file=sys.stderr)
    if as_json:
        status = "interrupted" if code is Exit.INTERRUPTED else "error"
        print(json.dumps({"status": status, "exit_code": int(code), "message": line}))
    raise SystemExit(int(code))


def interrupt_on_sigterm() -> None:
    """Let a polite kill end a run the way Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
