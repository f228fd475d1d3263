"""Text to tokens and back: /tokenize and /detokenize, in vLLM's form and, where `inputs` is sent, in TGI's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from isologit.errors import RequestError
from isologit.server.bodies import json_router
from isologit.server.fields import Body, Ignored, ListOf, Refused, Table
from isologit.server.openai_fields import Message
from isologit.server.service import Service
from isologit.server.token_names import token_name
from isologit.text.detokenizer import Detokenizer

_OTHERS: Table = {
    "tools": Refused(([],), "tool calls are not read out of answers here"),
    "chat_template": Refused(instead="only the model's own template is run"),
    "mm_processor_kwargs": Refused(({},), "messages are text here"),
    "parameters": Ignored("they do not change a prompt's tokens"),
}


class TokenizeRequest(Body):
    """One of `prompt` and `messages` (vLLM) and `inputs` (TGI)."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[ListOf[Message], Field(min_length=1)] | None = None
    inputs: str | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = False


class DetokenizeRequest(Body):
    """Token ids."""

    model: str | None = None
    tokens: ListOf[int]


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = json_router(tags=["tokens"])

    @routes.post("/tokenize")
    async def tokenize(asked: TokenizeRequest, http: Request) -> Response:
        service.check_model(asked.model)
        asked.check_others(_OTHERS, http)
        given = [name for name in ("prompt", "messages", "inputs") if getattr(asked, name) is not None]
        if len(given) != 1:
            raise RequestError("give the text in one of prompt, messages and inputs")
        if asked.messages is not None:
            ids = await service.chat_ids(
                [message.flat() for message in asked.messages],
                add_special_tokens=bool(asked.add_special_tokens),
                add_generation_prompt=asked.add_generation_prompt,
                continue_final_message=asked.continue_final_message,
                variables=asked.chat_template_kwargs,
            )
        else:
            text = asked.prompt if asked.prompt is not None else asked.inputs or ""
            ids = await service.encode(text, add_special_tokens=asked.add_special_tokens is not False)
        return await _beside(
            lambda: _spans(service, ids) if asked.inputs is not None else _counted(service, asked, ids)
        )

    @routes.post("/detokenize")
    async def detokenize(asked: DetokenizeRequest, http: Request) -> Response:
        service.check_model(asked.model)
        asked.check_others({}, http)
        service.engine.limits.check_ids(asked.tokens, "a token id", "use this model's tokenizer")
        return await _beside(lambda: {"prompt": service.text_with_special_tokens(asked.tokens)})

    return routes


async def _beside(make: Callable[[], Any]) -> Response:
    """A value made and written on another thread: a body may hold a million tokens."""
    text = await asyncio.to_thread(lambda: json.dumps(make()))
    return Response(text, media_type="application/json")


def _counted(service: Service, asked: TokenizeRequest, ids: list[int]) -> dict[str, Any]:
    return {
        "count": len(ids),
        "max_model_len": service.limits.max_model_len,
        "tokens": ids,
        "token_strs": [token_name(service.tokenizer, i) for i in ids] if asked.return_token_strs else None,
    }


def _spans(service: Service, ids: list[int]) -> list[dict[str, Any]]:
    """TGI's tokens: where in the text each one stands, in characters; special tokens stand nowhere."""
    feed, end = Detokenizer(service.tokenizer), 0
    found = []
    for number, token_id in enumerate(ids, 1):
        text = feed.push(token_id) + (feed.finish() if number == len(ids) else "")
        start, end = end, end + len(text)
        span = (start, end) if service.tokenizer.is_text(token_id) else (0, 0)
        name = token_name(service.tokenizer, token_id)
        found.append({"id": token_id, "text": name, "start": span[0], "stop": span[1]})
    return found
