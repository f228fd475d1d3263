"""Fixtures of the judge's tests."""

from tests.judge.small_round import finished_round

__all__ = ["finished_round"]
