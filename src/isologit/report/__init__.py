"""A run as one self-contained page, made from its result files only."""

from __future__ import annotations

from isologit.report.page import render_report

__all__ = ["render_report"]
