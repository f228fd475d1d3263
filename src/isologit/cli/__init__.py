"""The command line: parses arguments, shows progress, chooses exit codes. What is done is done in `job`."""

from __future__ import annotations

from isologit.cli.app import main

__all__ = ["main"]
