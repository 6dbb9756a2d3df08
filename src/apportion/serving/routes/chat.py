"""/v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from apportion.core.errors import InvalidParameter
from apportion.core.outputs import SequenceDelta
from apportion.serving.conversation import ChatFormat, Conversation
from apportion.serving.event_stream import DONE, event
from apportion.serving.protocol.openai import ChatCompletionRequest
from apportion.serving.protocol.openai_output import chat_logprobs, finish_reason, prompt_logprobs, usage
from apportion.serving.routes.generation import Generation, raise_failure
from apportion.serving.server import ServedModel, log_fields, server_of
from apportion.serving.stream import Stream
from apportion.serving.transforms import ContentDelta, ReasoningDelta, TextDelta, TextTransform, ToolCallDelta

router = APIRouter()


@router.post("/v1/chat/completions", response_class=Response, tags=["generation"])
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    server = server_of(request)
    log_fields(request, user=body.user)
    model = await server.loaded_model(body.model, request)
    if body.stream_options is not None and not body.stream:
        raise InvalidParameter("stream_options needs stream to be true")
    defaults = model.info.default_sampling if server.config.generation_config == "auto" else {}
    server.require_trust(body.chat_template)
    chat, chat_format = body.conversation(), server.chat_format(model)
    prompt = render(body, chat, chat_format)
    params = chat_format.constrain(body.sampling_params(defaults, body.num_logprobs()), chat, prompt)
    prompts = await model.encode_prompts([prompt], body.add_special_tokens)
    generation = Generation(
        server,
        request,
        model,
        prompts,
        params,
        streamed=bool(body.stream),
        priority=body.priority,
        cache_salt=body.cache_salt,
    )
    answer = _Answer(body, model, generation.request_id, lambda: chat_format.make_transform(chat, prompt))
    if body.stream:
        return await generation.events(answer.events)
    return await generation.answer(answer.whole)


def render(body: ChatCompletionRequest, chat: Conversation, chat_format: ChatFormat) -> str:
    """The prompt of a conversation. Errors: InvalidRequest when the template refuses it, InvalidParameter."""
    if body.continue_final_message and body.add_generation_prompt and "add_generation_prompt" in body.model_fields_set:
        raise InvalidParameter("continue_final_message and add_generation_prompt exclude each other")
    return chat_format.render(chat, add_generation_prompt=body.add_generation_prompt, continues=body.continue_final_message)


class _Choice:
    """One sequence on its way through its transform."""

    def __init__(self, body: ChatCompletionRequest, transform: TextTransform, prompt_token_ids: list[int]) -> None:
        self._body, self._transform, self._prompt_ids = body, transform, prompt_token_ids
        self._is_first = True
        self.called_tools = False

    def feed(self, delta: SequenceDelta) -> list[TextDelta]:
        raise_failure(delta)
        deltas = self._transform.feed(delta.text)
        if delta.finish_reason is not None:
            deltas += self._transform.finish()
        if self._is_first and self._body.echo and self._body.messages[-1].role == "assistant":
            deltas.insert(0, ContentDelta(str(self._body.messages[-1].content or "")))
        self.called_tools |= any(isinstance(d, ToolCallDelta) for d in deltas)
        return deltas

    def fields(self, delta: SequenceDelta) -> dict[str, Any]:
        """What stands beside the text."""
        reason = "tool_calls" if self.called_tools and delta.finish_reason == "stop" else finish_reason(delta)
        fields: dict[str, Any] = {
            "logprobs": chat_logprobs(delta, self._body.top_logprobs or 0),
            "finish_reason": reason,
            "stop_reason": delta.stop_reason,
        }
        if self._body.prompt_logprobs is not None and delta.prompt_logprobs:
            fields["prompt_logprobs"] = prompt_logprobs(delta.prompt_logprobs)
        if self._body.return_token_ids:
            fields |= {"token_ids": delta.token_ids}
            fields |= {"prompt_token_ids": self._prompt_ids} if self._is_first else {}
        self._is_first = False
        return fields


class _Answer:
    def __init__(
        self, body: ChatCompletionRequest, model: ServedModel, request_id: str, make_transform: Callable[[], TextTransform]
    ) -> None:
        self._body, self._make_transform = body, make_transform
        self._head = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": body.model or model.name}

    def whole(self, stream: Stream, deltas: list[SequenceDelta]) -> dict[str, Any]:
        choices = []
        for index, (choice, delta) in enumerate(zip(self._choices(stream), deltas, strict=True)):
            message = assemble(choice.feed(delta))
            choices.append({"index": index, "message": message, **choice.fields(delta)})
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage(stream)}

    async def events(self, stream: Stream) -> AsyncGenerator[bytes, None]:
        choices = self._choices(stream)
        options = self._body.stream_options
        head = {**self._head, "object": "chat.completion.chunk"}
        begun: set[int] = set()
        while news := await stream.get():
            for index, delta in news.items():
                if index not in begun:  # with its first token, so that a client that waits for any chunk measures that
                    begun.add(index)
                    first = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
                    yield event({**head, "choices": [first]})
                deltas = [chunk_delta(d) for d in choices[index].feed(delta)]
                fields = choices[index].fields(delta)
                *early, last = deltas or [{}]
                for piece in early:
                    yield event({**head, "choices": [{"index": index, "delta": piece, "logprobs": None, "finish_reason": None}]})
                chunk = {**head, "choices": [{"index": index, "delta": last, **fields}]}
                if options is not None and options.continuous_usage_stats:
                    chunk["usage"] = usage(stream, finished=False)
                yield event(chunk)
        if options is not None and options.include_usage:
            yield event({**head, "choices": [], "usage": usage(stream)})
        yield DONE

    def _choices(self, stream: Stream) -> list[_Choice]:
        [request] = stream.requests
        return [_Choice(self._body, self._make_transform(), request.prompt_token_ids) for _ in range(request.params.n)]


def chunk_delta(delta: TextDelta) -> dict[str, Any]:
    """`delta` of a stream's choice."""
    match delta:
        case ContentDelta(text):
            return {"content": text}
        case ReasoningDelta(text):
            return {"reasoning_content": text}
        case ToolCallDelta(index, arguments, call_id, name):
            function = {"arguments": arguments} if name is None else {"name": name, "arguments": arguments}
            call: dict[str, Any] = {"index": index, "function": function}
            return {"tool_calls": [call if call_id is None else {**call, "id": call_id, "type": "function"}]}


def assemble(deltas: list[TextDelta]) -> dict[str, Any]:
    """The whole message that the deltas of a stream make."""
    content = [d.text for d in deltas if isinstance(d, ContentDelta)]
    reasoning = [d.text for d in deltas if isinstance(d, ReasoningDelta)]
    calls: dict[int, dict[str, Any]] = {}
    for d in deltas:
        if isinstance(d, ToolCallDelta):
            call = calls.setdefault(d.index, {"id": d.id, "type": "function", "function": {"name": d.name, "arguments": ""}})
            call["function"]["arguments"] += d.arguments
    message: dict[str, Any] = {"role": "assistant", "content": "".join(content) if content or not calls else None}
    if reasoning:
        message["reasoning_content"] = "".join(reasoning)
    if calls:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    return message
