"""Types of fields in requests' bodies."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import FailFast

T = TypeVar("T")


class _First(FailFast):
    """pydantic's mark, made hashable so that it can stand in a union."""

    __hash__ = object.__hash__


# NOTE: a list with a million mistakes is refused for the first; telling all of them takes seconds and gigabytes.
ListOf = Annotated[list[T], _First()]
