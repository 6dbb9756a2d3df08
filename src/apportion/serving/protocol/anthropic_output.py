"""Anthropic's message object, the events of its stream and its errors, made of the blocks of an answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json

from apportion.serving.blocks import Block, Closed, Grown, Opened, Step
from apportion.serving.event_stream import named_event
from apportion.serving.protocol.errors import HttpError

ERROR_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
    503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip


def error_body(error: HttpError) -> dict[str, Any]:
    """Anthropic's error object; the field and the cause beside its message, as OpenAI's has them."""
    kind = ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    ours = error.body()["error"]
    extra = {key: ours[key] for key in ("param", "cause") if ours.get(key) is not None}
    return {"type": "error", "error": {"type": kind, "message": error.message, **extra}}


def error_event(error: HttpError) -> bytes:
    return named_event("error", error_body(error))


def content_block(block: Block) -> dict[str, Any]:
    """One block of a message. The input of a call that was cut is what of it is there."""
    match block.kind:
        case "text":
            return {"type": "text", "text": block.text}
        case "thought":
            return {"type": "thinking", "thinking": block.text, "signature": ""}
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": from_json(block.text or "{}", allow_partial=True)}


def empty_block(block: Block) -> dict[str, Any]:
    return content_block(Block(block.kind, block.index, "", block.call_id, block.name))


def message(message_id: str, model: str, num_prompt: int) -> dict[str, Any]:
    """As it is before anything was generated."""
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage(num_prompt, 0, 0),
    }


def usage(num_prompt: int, num_cached: int, num_output: int) -> dict[str, Any]:
    """input_tokens leaves out those that were read from the cache."""
    return {
        "input_tokens": num_prompt - num_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": num_cached,
        "output_tokens": num_output,
    }


def stop_fields(finish_reason: str | None, stop_reason: int | str | None, blocks: list[Block]) -> dict[str, Any]:
    """stop_reason and stop_sequence."""
    if finish_reason != "stop":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if isinstance(stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stop_reason}
    called = any(block.kind == "call" for block in blocks)
    return {"stop_reason": "tool_use" if called else "end_turn", "stop_sequence": None}


def step_events(step: Step) -> Iterator[bytes]:
    """Anthropic's events for what happened to a block."""
    place = {"index": step.block.index}
    match step:
        case Opened(block=block):
            yield _event("content_block_start", **place, content_block=empty_block(block))
        case Grown(block=block, text=text):
            kinds = {
                "text": ("text_delta", "text"),
                "thought": ("thinking_delta", "thinking"),
                "call": ("input_json_delta", "partial_json"),
            }
            kind, field = kinds[block.kind]
            yield _event("content_block_delta", **place, delta={"type": kind, field: text})
        case Closed():
            yield _event("content_block_stop", **place)


def start_event(begun: dict[str, Any]) -> bytes:
    return _event("message_start", message=begun)


def end_events(stop: dict[str, Any], counts: dict[str, Any]) -> Iterator[bytes]:
    yield _event("message_delta", delta=stop, usage=counts)
    yield _event("message_stop")


def _event(name: str, **fields: Any) -> bytes:
    return named_event(name, {"type": name, **fields})
