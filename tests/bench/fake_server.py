"""A server that speaks every dialect and fails on request: `fail:KIND` anywhere in a prompt asks for a failure."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from aiohttp import web

PROMPT_TOKENS = 7  # by this server's count
FAILURES = ("500", "drop", "cut", "truncate", "garbage", "in-band", "reason")


class FakeServer:
    """Answers `max_new_tokens` words `w0 w1 ...`, one each `token_s` seconds, from a thread of its own."""

    def __init__(
        self,
        *,
        token_s: float = 0.0,
        sse: bool = False,
        words_per_message: int = 1,
        counts: bool = True,
        models: Sequence[str] = ("fake",),
        answer: Sequence[bytes] | None = None,
    ) -> None:
        self.token_s = token_s
        self.sse = sse  # frame llm-serving's lines as standard server-sent events
        self.words_per_message = words_per_message
        self.counts = counts  # say how many tokens prompt and answer have
        self.models = models
        self.answer = answer  # instead of everything else, these bytes one after the other
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._runner: web.AppRunner | None = None

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def start(self) -> None:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    def stop(self) -> None:
        """Close the listening socket and every connection at once, as a killed process does."""
        if self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_post("/models/{model}/generate_stream", self._llm_serving)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/generate_stream", self._tgi)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        assert self._runner.addresses
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name} for name in self.models]})

    async def _llm_serving(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)

        def line(inner: dict[str, Any]) -> bytes:
            text = json.dumps({"event": "message", "retry": 30000, "data": [{"details": None, **inner}]})
            return f"data: {text}\r\n\r\n".encode() if self.sse else f"{text}\n".encode()

        words = self._words(body["parameters"]["max_new_tokens"])
        pieces = [line({"generated_text": word, "tokens": {"id": 5}, "top_tokens": [{"id": 5}]}) for word in words]
        reason = "predict_failed" if "fail:reason" in body["inputs"] else "length"
        count = {"generated_tokens": self._count(body["parameters"]["max_new_tokens"])}
        last = line({"generated_text": "".join(words), "finish_reason": reason, **count})
        error = line({"generated_text": "Error202: prompt out of range", "finish_reason": "prompt_out_of_range"})
        return await self._stream(request, body["inputs"], pieces, [last], error)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        return await self._openai(request, body, body["max_tokens"], str(body["prompt"]), lambda word: {"text": word})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        prompt = body["messages"][0]["content"]
        limit = body["max_completion_tokens"]
        return await self._openai(request, body, limit, prompt, lambda word: {"delta": {"content": word}})

    async def _openai(
        self, request: web.Request, body: dict[str, Any], limit: int, prompt: str, choice: Any
    ) -> web.StreamResponse:
        words = self._words(limit)
        pieces = [sse({"choices": [{**choice(word), "finish_reason": None}]}) for word in words]
        reason = "abort" if "fail:reason" in prompt else "length"
        end = [sse({"choices": [{**choice(""), "finish_reason": reason}]})]
        if body["stream_options"]["include_usage"] and self.counts:
            usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": limit}
            end.append(sse({"choices": [], "usage": usage}))
        error = sse({"error": {"message": "broken"}})
        return await self._stream(request, prompt, pieces, [*end, b"data: [DONE]\n\n"], error)

    async def _tgi(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        words = self._words(body["parameters"]["max_new_tokens"])

        def event(word: str, **more: Any) -> bytes:
            token = {"id": 5, "text": word, "logprob": 0.0, "special": False}
            return sse({"index": 0, "token": token, "generated_text": None, "details": None, **more})

        reason = "error" if "fail:reason" in body["inputs"] else "length"
        count = self._count(body["parameters"]["max_new_tokens"])
        prompt = PROMPT_TOKENS if self.counts else None
        details = {"finish_reason": reason, "generated_tokens": count, "input_length": prompt, "seed": None}
        last = event(words[-1], generated_text="".join(words), details=details)
        error = sse({"error": "broken", "error_type": "generation"})
        return await self._stream(request, body["inputs"], [event(word) for word in words[:-1]], [last], error)

    def _words(self, count: int) -> list[str]:
        """What each message adds; together `count` words."""
        words, each = [f"w{i} " for i in range(count)], self.words_per_message
        return ["".join(words[start : start + each]) for start in range(0, count, each)]

    def _count(self, count: int) -> int | None:
        return count if self.counts else None

    async def _body(self, request: web.Request) -> dict[str, Any]:
        body: dict[str, Any] = await request.json()
        self.bodies.append(body)
        self.paths.append(request.path)
        self.headers.append(dict(request.headers))
        return body

    async def _stream(
        self, request: web.Request, prompt: str, pieces: list[bytes], end: list[bytes], error: bytes
    ) -> web.StreamResponse:
        asked = re.search(r"fail:([\w-]+)", prompt)
        failure = asked[1] if asked else None
        if failure == "500":
            return web.json_response({"detail": "out of order"}, status=500)
        if failure == "drop":
            _disconnect(request)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if self.answer is not None:
            for piece in self.answer:
                await asyncio.sleep(self.token_s)
                await response.write(piece)
            return response
        for piece in pieces:
            await asyncio.sleep(self.token_s)
            await response.write(piece)
            if failure == "cut":
                _disconnect(request)
            if failure == "garbage":
                await response.write(b"<html>\n")
            if failure == "in-band":
                await response.write(error)
                return response
        if failure != "truncate":
            for piece in end:
                await response.write(piece)
        return response


@contextmanager
def fake_server(**options: Any) -> Iterator[FakeServer]:
    """A running server."""
    server = FakeServer(**options)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def sse(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


def _disconnect(request: web.Request) -> None:
    assert request.transport is not None
    request.transport.abort()
    raise ConnectionResetError
