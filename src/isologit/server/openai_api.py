"""OpenAI's API: /v1/models, /v1/completions, /v1/chat/completions, whole and streamed.

Fields that would change an answer and are not implemented are refused, never ignored. Extensions carry vLLM's names.
Streams are ASCII: some clients also split lines at U+2028.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from isologit.engine.async_engine import EngineFailedError
from isologit.engine.request import GenerationRequest, SamplingParams
from isologit.server.bodies import json_router
from isologit.server.openai_answers import ChatStyle, CompletionStyle, Style
from isologit.server.openai_fields import ChatRequest, CommonRequest, CompletionRequest, StreamOptions
from isologit.server.responses import StreamedAnswer
from isologit.server.service import Answer, RequestTimeoutError, Service

_DONE = "data: [DONE]\n\n"


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = json_router(tags=["openai"], prefix="/v1")

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service, name) for name in service.names]}

    @routes.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _model(service, name)

    @routes.post("/completions")
    async def completions(asked: CompletionRequest, http: Request) -> Response:
        service.check_model(asked.model)
        asked.check(http)
        params, prompts = asked.params(), asked.prompts()
        service.check_capacity(len(prompts) * (asked.n or 1))
        ids = [
            await service.prompt_ids(prompt, add_special_tokens=asked.add_special_tokens is not False)
            for prompt in prompts
        ]
        return await _Asked(service, http, asked, CompletionStyle).answer(ids, params)

    @routes.post("/chat/completions")
    async def chat(asked: ChatRequest, http: Request) -> Response:
        service.check_model(asked.model)
        asked.check(http)
        service.check_capacity(asked.n or 1)
        ids = await service.chat_ids(
            [message.flat() for message in asked.messages],
            add_special_tokens=bool(asked.add_special_tokens),
            add_generation_prompt=asked.add_generation_prompt is not False,
            continue_final_message=bool(asked.continue_final_message),
            documents=asked.documents,
            variables=asked.chat_template_kwargs,
        )
        params = asked.params(service.limits.max_model_len - len(ids))
        return await _Asked(service, http, asked, ChatStyle).answer([ids], params)

    return routes


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "isologit",
        "max_model_len": service.limits.max_model_len,
    }


@dataclass
class _Asked:
    """One request over HTTP: several prompts, several choices for each."""

    service: Service
    http: Request
    asked: CommonRequest
    style_class: type[Style]

    async def answer(self, prompts: Sequence[list[int]], params: SamplingParams) -> Response:
        """The answer, whole or as a stream."""
        service, asked, count = self.service, self.asked, self.asked.n or 1
        requests = []
        for prompt in prompts:
            ids = asked.truncated(await service.prompt_ids(prompt), service.limits.max_model_len - params.max_tokens)
            for number in range(count):
                seed = None if params.seed is None else params.seed + number
                requests.append(service.request(ids, replace(params, seed=seed)))
        style = self.style_class(
            service.tokenizer, params.logprobs, ids_as_names=bool(asked.return_tokens_as_token_ids)
        )
        head = {
            "id": f"{style.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model or service.names[0],
        }
        if asked.stream:
            answer = service.answer(requests)
            return StreamedAnswer(answer, self._events(answer, requests, head, style))
        found = await service.collect(self.http.receive, requests)
        choices = [
            {
                "index": i,
                **style.whole(output.text, tokens),
                "finish_reason": output.finish_reason,
                "stop_reason": output.stop_reason,
                **self._ids(output.token_ids, requests[i]),
            }
            for i, (tokens, output) in enumerate(found)
        ]
        usage = _usage(requests, count, sum(len(output.token_ids) for _, output in found))
        return JSONResponse({**head, "object": style.whole_object, "choices": choices, "usage": usage})

    def _ids(self, token_ids: Sequence[int], request: GenerationRequest | None) -> dict[str, Any]:
        """What `return_token_ids` adds to a choice; the prompt's ids stand in its first part."""
        if not self.asked.return_token_ids:
            return {}
        return {
            "token_ids": list(token_ids),
            "prompt_token_ids": None if request is None else list(request.prompt_token_ids),
        }

    async def _events(
        self, answer: Answer, requests: Sequence[GenerationRequest], head: dict[str, Any], style: Style
    ) -> AsyncIterator[str]:
        """Events: one for what a step brought a choice, then the usage, then [DONE]."""
        count, options = self.asked.n or 1, self.asked.stream_options or StreamOptions()
        head = {**head, "object": style.part_object}
        if options.include_usage:
            head["usage"] = None
        output_tokens = 0
        offsets = [0] * len(requests)
        begun = [False] * len(requests)

        def event(index: int, choice: dict[str, Any], ids: Sequence[int], reason: str | None, stop: Any) -> str:
            shown = self._ids(ids, None if begun[index] else requests[index])
            begun[index] = True
            choices = [{"index": index, **choice, "finish_reason": reason, "stop_reason": stop, **shown}]
            if options.continuous_usage_stats:
                head["usage"] = _usage(requests, count, output_tokens)
            return f"data: {json.dumps({**head, 'choices': choices})}\n\n"

        try:
            if style.first is not None:
                yield "".join(event(index, dict(style.first), (), None, None) for index in range(len(requests)))
            async for step in answer.steps():
                events = []
                for index, piece in step:
                    text, output = piece.text, piece.output
                    ids = [token.id for token in piece.tokens]
                    output_tokens += len(ids)
                    if text or output is not None or style.logprobs is not None or self.asked.return_token_ids:
                        reason, stop = (None, None) if output is None else (output.finish_reason, output.stop_reason)
                        events.append(event(index, style.part(text, piece.tokens, offsets[index]), ids, reason, stop))
                    offsets[index] += sum(len(token.text) for token in piece.tokens)
                if events:
                    yield "".join(events)
            if options.include_usage:
                usage = _usage(requests, count, output_tokens)
                yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
        except EngineFailedError as error:
            code = 504 if isinstance(error, RequestTimeoutError) else 500
            body = {"message": str(error), "type": "internal_error", "param": None, "code": code}
            yield f"data: {json.dumps({'error': body})}\n\n"
        yield _DONE


def _usage(requests: Sequence[GenerationRequest], count: int, output_tokens: int) -> dict[str, int]:
    """Prompt tokens count once, however many answers they get."""
    prompt_tokens = sum(len(request.prompt_token_ids) for request in requests[::count])
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
    }
