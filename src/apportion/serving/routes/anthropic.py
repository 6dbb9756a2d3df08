"""/v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response

from apportion.serving.blocks import Step
from apportion.serving.protocol.anthropic import CountTokensRequest, MessageRequest
from apportion.serving.protocol.anthropic_output import (
    content_block,
    end_events,
    error_event,
    message,
    start_event,
    step_events,
    stop_fields,
    usage,
)
from apportion.serving.routes.turn import Turn, defaults_of
from apportion.serving.server import log_fields, server_of

router = APIRouter(prefix="/v1/messages", tags=["generation"])


@router.post("", response_class=Response)
async def create_message(body: MessageRequest, request: Request) -> Response:
    server = server_of(request)
    log_fields(request, user=body.metadata.user_id if body.metadata else None)
    model = await server.loaded_model(body.model, request)
    params = body.sampling_params(defaults_of(server, model))
    turn = await Turn.begin(
        server,
        request,
        model,
        body.conversation(),
        params,
        streamed=bool(body.stream),
        continues=body.continues,
        priority=body.priority,
        cache_salt=body.cache_salt,
    )
    begun = message(f"msg_{uuid4().hex}", body.model or model.name, turn.num_prompt_tokens)

    def whole() -> dict[str, Any]:
        return {**begun, "content": [content_block(block) for block in turn.blocks], **_stop(turn), "usage": _usage(turn)}

    async def events(steps: AsyncGenerator[Step, None]) -> AsyncGenerator[bytes, None]:
        yield start_event(begun)
        async for step in steps:
            for piece in step_events(step):
                yield piece
        for piece in end_events(_stop(turn), _usage(turn)):
            yield piece

    if body.stream:
        return await turn.events(events, error_event)
    return await turn.answer(whole)


@router.post("/count_tokens")
async def count_tokens(body: CountTokensRequest, request: Request) -> dict[str, int]:
    """Exact: the prompt is rendered as it would be."""
    server = server_of(request)
    model = await server.loaded_model(body.model, request)
    prompt = server.chat_format(model).render(body.conversation(), continues=body.continues)
    return {"input_tokens": len(await model.encode(prompt, False))}


def _stop(turn: Turn) -> dict[str, Any]:
    return stop_fields(turn.finish_reason, turn.stop_reason, turn.blocks)


def _usage(turn: Turn) -> dict[str, Any]:
    return usage(turn.num_prompt_tokens, turn.num_cached_tokens, turn.num_tokens)
