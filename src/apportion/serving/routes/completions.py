"""/v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response

from apportion.core.errors import InvalidParameter
from apportion.core.outputs import SequenceDelta
from apportion.core.sampling_params import SamplingParams
from apportion.serving.event_stream import DONE, event
from apportion.serving.protocol.openai import CompletionRequest
from apportion.serving.protocol.openai_output import CompletionLogprobs, finish_reason, prompt_logprobs, usage
from apportion.serving.routes.generation import Generation, raise_failure
from apportion.serving.server import ServedModel, log_fields, server_of
from apportion.serving.stream import Stream

router = APIRouter()


@router.post("/v1/completions", response_class=Response, tags=["generation"])
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    server = server_of(request)
    log_fields(request, user=body.user)
    model = await server.loaded_model(body.model, request)
    if body.stream_options is not None and not body.stream:
        raise InvalidParameter("stream_options needs stream to be true")
    params = _params(body, model.info.default_sampling if server.config.generation_config == "auto" else {})
    prompts = await model.encode_prompts(body.prompts(), body.add_special_tokens)
    generation = Generation(
        server, request, model, prompts, params, streamed=bool(body.stream), priority=body.priority, cache_salt=body.cache_salt
    )
    answer = _Answer(body, model, generation.request_id, params)
    if body.stream:
        return await generation.events(answer.events)
    return await generation.answer(answer.whole)


def _params(body: CompletionRequest, defaults: dict[str, Any]) -> SamplingParams:
    """max_tokens 0 asks for the prompt alone: one token is generated, as the engine must, and not shown."""
    wanted = body.model_copy(update={"max_tokens": 1}) if body.max_tokens == 0 else body
    if body.max_tokens == 0 and not body.echo:
        raise InvalidParameter("max_tokens is 0 and echo is false: there would be nothing to answer")
    params = wanted.sampling_params(defaults, body.logprobs)
    if body.echo and body.logprobs is not None and params.prompt_logprobs is None:
        params.prompt_logprobs = body.logprobs
    return params


class _Choice:
    """What one choice has to remember between pieces: whether its prompt was shown, where its text stands."""

    def __init__(self, body: CompletionRequest, prompt_token_ids: list[int], prompt: str | None, model: ServedModel) -> None:
        self._body, self._model, self._prompt_ids, self._prompt = body, model, prompt_token_ids, prompt
        self._logprobs = CompletionLogprobs(with_top=bool(body.logprobs))
        self._is_first = True
        self._prompt_entries: list[Any] = []

    def make(self, delta: SequenceDelta) -> dict[str, Any]:
        """The fields of the choice that are new."""
        raise_failure(delta)
        text, token_ids, entries = delta.text, delta.token_ids, delta.logprobs
        if self._body.max_tokens == 0:
            text, token_ids, entries = "", [], entries and []
        shown_ids: list[int] = list(token_ids)
        shown: list[Any] | None = None if entries is None else list(entries)
        if self._body.echo and self._is_first:
            text = self._prompt_text() + text
            shown_ids = self._prompt_ids + shown_ids
            shown = None if shown is None else [*(delta.prompt_logprobs or ()), *shown]
        fields: dict[str, Any] = {"text": text, "logprobs": None}
        if shown is not None:
            fields["logprobs"] = self._logprobs.make(shown_ids, shown, [self._model.tokenizer.token_text(t) for t in shown_ids])
        if self._body.prompt_logprobs is not None and self._is_first:
            fields["prompt_logprobs"] = prompt_logprobs(delta.prompt_logprobs)
        if self._body.return_token_ids:
            fields["token_ids"] = list(token_ids)
            fields |= {"prompt_token_ids": self._prompt_ids} if self._is_first else {}
        fields |= {"finish_reason": finish_reason(delta), "stop_reason": delta.stop_reason}
        self._is_first = False
        return fields

    def _prompt_text(self) -> str:
        return self._model.tokenizer.decode(self._prompt_ids) if self._prompt is None else self._prompt


class _Answer:
    def __init__(self, body: CompletionRequest, model: ServedModel, request_id: str, params: SamplingParams) -> None:
        self._body, self._model, self._params = body, model, params
        name = body.model or model.name
        self._head = {"id": f"cmpl-{request_id}", "object": "text_completion", "created": int(time.time()), "model": name}

    def whole(self, stream: Stream, deltas: list[SequenceDelta]) -> dict[str, Any]:
        choices = [{"index": i, **choice.make(delta)} for i, (choice, delta) in enumerate(zip(self._choices(stream), deltas, strict=True))]
        return {**self._head, "choices": choices, "usage": usage(stream)}

    async def events(self, stream: Stream) -> AsyncGenerator[bytes, None]:
        choices = self._choices(stream)
        options = self._body.stream_options
        wants_prompt = self._params.prompt_logprobs is not None
        held: dict[int, SequenceDelta] = {}
        while news := await stream.get():
            for index, delta in news.items():
                if wants_prompt and not delta.token_ids and delta.finish_reason is None:
                    held[index] = delta if index not in held else held[index].join(delta)  # the prompt's come in chunks: one piece
                    continue
                delta = held.pop(index).join(delta) if index in held else delta
                chunk = {**self._head, "choices": [{"index": index, **choices[index].make(delta)}]}  # also of a token without text
                if options is not None and options.continuous_usage_stats:
                    chunk["usage"] = usage(stream, finished=False)
                yield event(chunk)
        if options is not None and options.include_usage:
            yield event({**self._head, "choices": [], "usage": usage(stream)})
        yield DONE

    def _choices(self, stream: Stream) -> list[_Choice]:
        return [_Choice(self._body, r.prompt_token_ids, r.prompt, self._model) for r in stream.requests for _ in range(r.params.n)]
