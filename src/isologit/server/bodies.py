"""Requests' bodies as JSON objects, and what is wrong with those that are none: in one line that names the cause."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers

_CHARSETS = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})
_GZIP = b"\x1f\x8b"
_HINT = "send a JSON object with the header Content-Type: application/json"


def refusal_of_headers(headers: Headers, *, has_body: bool) -> tuple[int, str] | None:
    """Status and reason, when the headers of a POST tell that its body is not JSON as it stands."""
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        return 415, f"a body with Content-Encoding {encoding} is not read here; send it uncompressed"
    if not has_body:
        return None
    given = headers.get("content-type")
    if given is None:
        return 415, f"the request has no Content-Type; {_HINT}"
    kind, *parameters = (part.strip().lower() for part in given.split(";"))
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        return 415, f"the Content-Type is {kind!r}; {_HINT}"
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "charset" and value.strip(' "') not in _CHARSETS:
            return 415, f"the charset is {value}; JSON is sent in UTF-8"
    return None


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises HTTPException (400) with the cause and, where there is one, the place."""
    if body.startswith(_GZIP):
        raise HTTPException(400, "the body is compressed with gzip, which is not read here; send it uncompressed")
    try:
        value = json.loads(body.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        found = f"byte 0x{body[error.start]:02x} at position {error.start}"
        raise HTTPException(400, f"the body is not UTF-8 ({found}); encode the JSON as UTF-8") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno} (character {error.pos})"
        raise HTTPException(400, f"the body is not JSON: {error.msg}, at {place}") from None
    except RecursionError:
        raise HTTPException(400, "the body is JSON nested too deeply; send a flat object") from None
    except ValueError:  # NOTE: Python refuses integers of thousands of digits
        raise HTTPException(400, "the body holds a number with too many digits") from None
    if not isinstance(value, dict):
        raise HTTPException(400, f"the body must be a JSON object, not {_KINDS[type(value)]}")
    return value


_KINDS = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a boolean", type(None): "null"}


class _JsonRequest(Request):
    async def json(self) -> Any:
        return read_object(await self.body())


class _JsonRoute(APIRoute):
    """A route whose body is read by `read_object`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(http: Request) -> Response:
            asked = _JsonRequest(http.scope, http.receive)
            if self.body_field is not None and not await asked.body():
                raise HTTPException(400, f"the body is empty; {_HINT}")
            return await handle(asked)

        return handler


def json_router(**more: Any) -> APIRouter:
    """A router whose bodies are JSON objects."""
    return APIRouter(route_class=_JsonRoute, **more)
