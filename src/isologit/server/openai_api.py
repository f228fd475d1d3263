"""OpenAI's API: /v1/models, /v1/completions, /v1/chat/completions, whole and streamed.

Fields that would change an answer and are not implemented are refused, never ignored. Extensions carry vLLM's names.
Streams are ASCII: some clients also split lines at U+2028.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from isologit.engine.async_engine import EngineFailedError
from isologit.engine.request import GenerationRequest, RequestOutput, SamplingParams
from isologit.server.bodies import json_router
from isologit.server.commitments import REQUEST_ID_HEADER
from isologit.server.openai_answers import ChatStyle, CompletionStyle, Style
from isologit.server.openai_fields import ChatRequest, CommonRequest, CompletionRequest, StreamOptions
from isologit.server.responses import StreamedAnswer
from isologit.server.service import Answer, RequestTimeoutError, Service, Token
from isologit.text.detokenizer import Detokenizer

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
        asked.check(http, service.config.vocab_size)
        params, prompts = asked.params(), asked.prompts()
        service.check_capacity(len(prompts) * (asked.n or 1))
        ids = []
        for prompt in prompts:
            ids.append(await service.prompt_ids(prompt, add_special_tokens=asked.add_special_tokens is not False))
            await asyncio.sleep(0)  # thousands of prompts in a row would hold up the others
        texts = [prompt if isinstance(prompt, str) else None for prompt in prompts] if asked.echo else None
        return await _Asked(service, http, asked, CompletionStyle, texts).answer(ids, params)

    @routes.post("/chat/completions")
    async def chat(asked: ChatRequest, http: Request) -> Response:
        service.check_model(asked.model)
        asked.check(http, service.config.vocab_size)
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
    """One request over HTTP: several prompts, several choices for each.

    echoed: the prompts' texts, where their answers begin with them; None for a prompt of token ids.
    """

    service: Service
    http: Request
    asked: CommonRequest
    style_class: type[Style]
    echoed: Sequence[str | None] | None = None

    async def answer(self, prompts: Sequence[list[int]], params: SamplingParams) -> Response:
        """The answer, whole or as a stream."""
        service, asked, count = self.service, self.asked, self.asked.n or 1
        requests = []
        for prompt in prompts:
            ids = asked.truncated(await service.prompt_ids(prompt), service.limits.max_model_len - params.max_tokens)
            for number in range(count):
                seed = None if params.seed is None else params.seed + number
                is_echoed = self.echoed is not None
                requests.append(service.request(ids, replace(params, seed=seed), is_echoed=is_echoed))
        style = self.style_class(
            service.tokenizer, params.logprobs, ids_as_names=bool(asked.return_tokens_as_token_ids)
        )
        head = {
            "id": f"{style.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model or service.names[0],
        }
        if asked.stream:
            answer = service.answer(requests, client_id=self.http.headers.get(REQUEST_ID_HEADER))
            return StreamedAnswer(answer, self._events(answer, requests, head, style))
        found = await service.collect(self.http.receive, requests)
        choices = [
            {
                "index": i,
                **style.whole(self._prompt_text(requests[i], i // count) + output.text, self._tokens(tokens, output)),
                "finish_reason": output.finish_reason,
                "stop_reason": output.stop_reason,
                **({"token_ids": list(output.token_ids)} if asked.return_token_ids else {}),
            }
            for i, (tokens, output) in enumerate(found)
        ]
        for choice, (_, output) in zip(choices, found, strict=True):
            of_prompt = self._of_prompt(output.prompt_token_ids, output.prompt_logprobs, style)
            (head if style.has_one_prompt else choice).update(of_prompt)
        usage = _usage(requests, count, sum(len(output.token_ids) for _, output in found))
        return JSONResponse({**head, "object": style.whole_object, "choices": choices, "usage": usage})

    def _of_prompt(
        self, ids: Sequence[int], logprobs: Sequence[dict[int, float] | None] | None, style: Style
    ) -> dict[str, Any]:
        """What vLLM's extensions tell of a prompt: its token ids, and the log-probabilities of its tokens."""
        shown: dict[str, Any] = {}
        if self.asked.return_token_ids:
            shown["prompt_token_ids"] = list(ids)
        if self.asked.prompt_logprobs is not None and logprobs is not None:
            shown["prompt_logprobs"] = style.prompt_logprobs(ids, logprobs, self.asked.prompt_logprobs)
        return shown

    def _prompt_text(self, request: GenerationRequest, number: int) -> str:
        """What stands before an answer: nothing, unless the prompt is to be echoed."""
        if self.echoed is None:
            return ""
        text = self.echoed[number]
        is_whole = text is not None and self.asked.truncate_prompt_tokens is None
        return text if text is not None and is_whole else self.service.tokenizer.decode(request.prompt_token_ids)

    def _tokens(self, tokens: list[Token], output: RequestOutput) -> list[Token]:
        """The tokens whose log-probabilities are shown: those of an echoed prompt come first."""
        if self.echoed is None or output.prompt_logprobs is None:
            return tokens
        feed, ids = Detokenizer(self.service.tokenizer), output.prompt_token_ids
        texts = [feed.push(token_id) for token_id in ids]
        texts[-1] += feed.finish()
        parts = zip(ids, texts, texts, output.prompt_logprobs, strict=True)
        return [*(Token(*part) for part in parts), *tokens]

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

        def event(
            index: int, choice: dict[str, Any], ids: Sequence[int], reason: str | None, stop: Any, commit: Any = None
        ) -> str:
            value: dict[str, Any] = {**head} if commit is None else {**head, "commit": commit}
            shown = {"index": index, **choice, "finish_reason": reason, "stop_reason": stop}
            if self.asked.return_token_ids:
                shown["token_ids"] = list(ids)
            if not begun[index]:
                of_prompt = self._of_prompt(requests[index].prompt_token_ids, None, style)
                (value if style.has_one_prompt else shown).update(of_prompt)
                begun[index] = True
            if options.continuous_usage_stats:
                value["usage"] = _usage(requests, count, output_tokens)
            return f"data: {json.dumps({**value, 'choices': [shown]})}\n\n"

        try:
            if style.first is not None:
                yield "".join(event(index, dict(style.first), (), None, None) for index in range(len(requests)))
            if self.echoed is not None:
                for index, request in enumerate(requests):
                    text = self._prompt_text(request, index // count)
                    yield event(index, style.part(text, (), 0), (), None, None)
                    offsets[index] = len(text)
            async for step in answer.steps():
                events = []
                for index, piece in step:
                    text, output = piece.text, piece.output
                    ids = [token.id for token in piece.tokens]
                    output_tokens += len(ids)
                    is_shown = text or output is not None or piece.commit is not None
                    if is_shown or style.logprobs is not None or self.asked.return_token_ids:
                        reason, stop = (None, None) if output is None else (output.finish_reason, output.stop_reason)
                        choice = style.part(text, piece.tokens, offsets[index])
                        events.append(event(index, choice, ids, reason, stop, piece.commit))
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
