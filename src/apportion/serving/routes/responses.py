"""/v1/responses."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from pydantic import TypeAdapter

from apportion.core.errors import InvalidParameter
from apportion.serving.blocks import Step
from apportion.serving.event_stream import encode_json
from apportion.serving.protocol.errors import HttpError
from apportion.serving.protocol.responses import Item, ResponseRequest, to_messages
from apportion.serving.protocol.responses_output import ResponseEvents, ResponseObject, events_of, item, usage
from apportion.serving.response_store import StoredResponse
from apportion.serving.routes.turn import Turn, defaults_of
from apportion.serving.server import Server, log_fields, server_of

router = APIRouter(prefix="/v1/responses", tags=["generation"])
ITEMS: TypeAdapter[list[Any]] = TypeAdapter(list[Item])


@router.post("", response_class=Response)
async def create_response(body: ResponseRequest, request: Request) -> Response:
    server = server_of(request)
    if body.stream_options is not None and not body.stream:
        raise InvalidParameter("stream_options needs stream to be true")
    earlier = server.responses.get(body.previous_response_id, param="previous_response_id").messages if body.previous_response_id else []
    model = await server.loaded_model(body.model, request)
    log_fields(request, user=body.user, safety_identifier=body.safety_identifier)
    chat = body.conversation(earlier)
    params = body.sampling_params(defaults_of(server, model))
    turn = await Turn.begin(
        server, request, model, chat, params, streamed=bool(body.stream), priority=body.priority, cache_salt=body.cache_salt
    )
    response = ResponseObject(body, f"resp_{uuid4().hex}", model.name, turn.params.temperature, turn.params.top_p)
    answer = _Answer(server, body, earlier, turn, response)
    if body.stream:
        return await turn.events(answer.events, answer.failure)
    return await turn.answer(answer.whole)


@router.get("/{response_id}", response_class=Response)
async def get_response(response_id: str, request: Request) -> Response:
    return Response(server_of(request).responses.get(response_id).response, media_type="application/json")


@router.delete("/{response_id}")
async def delete_response(response_id: str, request: Request) -> dict[str, Any]:
    server_of(request).responses.remove(response_id)
    return {"id": response_id, "object": "response.deleted", "deleted": True}


class _Answer:
    def __init__(self, server: Server, body: ResponseRequest, earlier: list[dict[str, Any]], turn: Turn, response: ResponseObject) -> None:
        self._server, self._body, self._earlier = server, body, earlier
        self._turn, self._response = turn, response
        self._events = ResponseEvents(response)

    def whole(self) -> dict[str, Any]:
        is_cut = self._turn.finish_reason != "stop"
        last = len(self._turn.blocks) - 1
        output = [item(self._response.id, b, "incomplete" if is_cut and b.index == last else "completed") for b in self._turn.blocks]
        return self._end(output)

    async def events(self, steps: AsyncGenerator[Step, None]) -> AsyncGenerator[bytes, None]:
        async for piece in events_of(self._events, steps):
            yield piece
        yield self._events.end(self._end(self._events.output))

    def failure(self, error: HttpError) -> bytes:
        return self._events.end(self._response.failed(self._events.output, error))

    def _end(self, output: list[dict[str, Any]]) -> dict[str, Any]:
        turn = self._turn
        counts = usage(turn.num_prompt_tokens, turn.num_cached_tokens, turn.num_tokens, turn.num_thought_tokens)
        response = self._response.ended(output, turn.finish_reason, counts)
        if self._body.store is not False:
            messages = [*self._earlier, *self._body.messages(), *to_messages(ITEMS.validate_python(output))]
            held = encode_json(response)
            self._server.responses.put(self._response.id, StoredResponse(held, messages, len(held) + len(encode_json(messages))))
        return response
