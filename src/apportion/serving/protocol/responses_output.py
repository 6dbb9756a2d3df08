"""OpenAI's response object and the events of its stream, made of the blocks of an answer."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from apportion.serving.blocks import Block, Closed, Grown, Opened, Step
from apportion.serving.event_stream import named_event
from apportion.serving.protocol.errors import HttpError
from apportion.serving.protocol.responses import NamedToolItem, ResponseRequest

PREFIXES = {"text": "msg", "thought": "rs", "call": "fc"}
PARTS = {"text": "output_text", "thought": "reasoning_text"}


def item(response_id: str, block: Block, status: str) -> dict[str, Any]:
    """An output item. status: in_progress (its text is then still empty), completed or incomplete."""
    item_id = f"{PREFIXES[block.kind]}_{response_id.removeprefix('resp_')}_{block.index}"
    begun = status == "in_progress"
    match block.kind:
        case "text":
            content = [] if begun else [part(block, block.text)]
            return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": content}
        case "thought":
            content = [] if begun else [part(block, block.text)]
            return {"id": item_id, "type": "reasoning", "status": status, "summary": [], "content": content}
    call = {"call_id": block.call_id, "name": block.name, "arguments": "" if begun else block.text}
    return {"id": item_id, "type": "function_call", "status": status, **call}


def part(block: Block, text: str) -> dict[str, Any]:
    """The one content part of a message or a thought."""
    return {"type": PARTS[block.kind], "text": text} | ({"annotations": [], "logprobs": []} if block.kind == "text" else {})


class ResponseObject:
    """What is told of a response while it is written and when it has ended. temperature, top_p: what is sampled with."""

    def __init__(self, body: ResponseRequest, response_id: str, model: str, temperature: float, top_p: float) -> None:
        self.id = response_id
        text_format = body.text.format if body.text and body.text.format else None
        self._fields: dict[str, Any] = {
            "id": response_id,
            "object": "response",
            "created_at": int(time.time()),
            "background": False,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model or model,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "service_tier": "default",
            "store": body.store is not False,
            "temperature": temperature,
            "text": {"format": text_format.model_dump(by_alias=True, exclude_none=True) if text_format else {"type": "text"}},
            "tool_choice": body.tool_choice.model_dump() if isinstance(body.tool_choice, NamedToolItem) else body.tool_choice or "auto",
            "tools": [{**tool.model_dump(), "strict": bool(tool.strict)} for tool in body.tools or ()],
            "top_p": top_p,
            "truncation": "disabled",
            "user": body.user,
        }

    def begun(self) -> dict[str, Any]:
        return {**self._fields, "status": "in_progress", "error": None, "incomplete_details": None, "output": [], "usage": None}

    def ended(self, output: list[dict[str, Any]], finish_reason: str | None, usage: dict[str, Any]) -> dict[str, Any]:
        """With all of its output. An answer that was cut is incomplete."""
        is_whole = finish_reason == "stop"
        return {
            **self.begun(),
            "status": "completed" if is_whole else "incomplete",
            "completed_at": int(time.time()) if is_whole else None,
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "output": output,
            "usage": usage,
        }

    def failed(self, output: list[dict[str, Any]], error: HttpError) -> dict[str, Any]:
        code = {429: "rate_limit_exceeded", 400: "invalid_prompt"}.get(error.status, "server_error")
        return {**self.begun(), "status": "failed", "error": {"code": code, "message": error.message}, "output": output}


def usage(num_input: int, num_cached: int, num_output: int, num_thought: int) -> dict[str, Any]:
    return {
        "input_tokens": num_input,
        "input_tokens_details": {"cached_tokens": num_cached, "cache_write_tokens": 0},
        "output_tokens": num_output,
        "output_tokens_details": {"reasoning_tokens": num_thought},
        "total_tokens": num_input + num_output,
    }


class ResponseEvents:
    """OpenAI's events of one response, numbered. output: the items that are done."""

    def __init__(self, response: ResponseObject) -> None:
        self._response = response
        self._number = 0
        self.output: list[dict[str, Any]] = []

    def begin(self) -> Iterator[bytes]:
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self._response.begun())

    def step(self, step: Step) -> Iterator[bytes]:
        block = step.block
        here = {"item_id": item(self._response.id, block, "in_progress")["id"], "output_index": block.index}
        in_part = {**here, "content_index": 0}
        kind = PARTS.get(block.kind, "function_call_arguments")
        place = here if block.kind == "call" else in_part
        extra: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
        match step:
            case Opened():
                yield self._item_event("added", block, "in_progress")
                if block.kind != "call":
                    yield self._event("response.content_part.added", **in_part, part=part(block, ""))
            case Grown(text=text):
                yield self._event(f"response.{kind}.delta", **place, delta=text, **extra)
            case Closed(is_cut=is_cut):
                whole = {"name": block.name, "arguments": block.text} if block.kind == "call" else {"text": block.text}
                yield self._event(f"response.{kind}.done", **place, **whole, **extra)
                if block.kind != "call":
                    yield self._event("response.content_part.done", **in_part, part=part(block, block.text))
                yield self._item_event("done", block, "incomplete" if is_cut else "completed")

    def end(self, response: dict[str, Any]) -> bytes:
        """The last event: response.completed, response.incomplete or response.failed."""
        return self._event(f"response.{response['status']}", response=response)

    def _item_event(self, name: str, block: Block, status: str) -> bytes:
        whole = item(self._response.id, block, status)
        if name == "done":
            self.output.append(whole)
        return self._event(f"response.output_item.{name}", output_index=block.index, item=whole)

    def _event(self, name: str, /, **fields: Any) -> bytes:
        data = {"type": name, "sequence_number": self._number, **fields}
        self._number += 1
        return named_event(name, data)


async def events_of(events: ResponseEvents, steps: AsyncGenerator[Step, None]) -> AsyncGenerator[bytes, None]:
    """The beginning of a stream and its steps."""
    for piece in events.begin():
        yield piece
    async for step in steps:
        for piece in events.step(step):
            yield piece
