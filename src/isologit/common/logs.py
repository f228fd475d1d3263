"""How errors are logged: where they came from, never what they say, which may hold a prompt."""

from __future__ import annotations

import logging
import traceback

_logger = logging.getLogger("isologit")


def log_error(what: str, error: Exception) -> None:
    """One line that names the error's type, and the lines of code it came through."""
    frames = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    _logger.error("%s: %s\n%s", what, type(error).__name__, frames)
