"""The board and the reports over HTTP, read from the database at every request: a page cannot be stale."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse

from isologit.common.listening import bind, url_of
from isologit.judge.board import BoardError, read_board, read_rounds
from isologit.judge.database import Database
from isologit.judge.pages import POLICY, board_page
from isologit.judge.reports import entry_report

_REFRESH_S = 5
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def create_app(database: Database) -> FastAPI:
    """`/` and `/rounds/ID`: the board; `/rounds/ID/entries/SHA256`: a report; `/api/...`: the same as JSON."""
    app = FastAPI(title="isologit judge", docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def _protect(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await answer(request)
        response.headers.update(_HEADERS)
        return response

    @app.exception_handler(BoardError)
    async def _missing(request: Request, error: BoardError) -> PlainTextResponse:
        return PlainTextResponse(f"{error}\n", status_code=404)

    def page(round_id: str | None) -> HTMLResponse:
        board = read_board(database, round_id)
        finished = board.state == "finished"
        links = {row.sha256: f"/rounds/{board.round_id}/entries/{row.sha256}" for row in board.rows} if finished else {}
        return HTMLResponse(board_page(board, links=links, refresh_s=None if finished else _REFRESH_S))

    @app.get("/")
    def newest() -> HTMLResponse:
        return page(None)

    @app.get("/rounds/{round_id}")
    def one(round_id: str) -> HTMLResponse:
        return page(round_id)

    @app.get("/rounds/{round_id}/entries/{sha256}")
    def report(round_id: str, sha256: str) -> HTMLResponse:
        board = read_board(database, round_id)
        return HTMLResponse(entry_report(database, board, sha256).html)

    @app.get("/api/rounds")
    def rounds() -> JSONResponse:
        names = ("id", "profile", "state", "created_at")
        return JSONResponse([dict(zip(names, row, strict=True)) for row in read_rounds(database)])

    @app.get("/api/rounds/{round_id}")
    def board(round_id: str) -> JSONResponse:
        return JSONResponse(read_board(database, round_id).to_dict())

    return app


def serve(database: Database, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve the board until interrupted; `say` is told its address. Raises ConfigError when the address is taken."""
    listener = bind(host, port)
    say(f"{url_of(listener)}/")
    config = uvicorn.Config(create_app(database), log_level="warning", access_log=False)
    asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))
