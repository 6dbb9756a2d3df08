"""`apportion bench serve`: offers a load to any OpenAI-compatible server and records when every token came.

The schedule is fixed before the run and does not wait for the server. Latency counts from the moment at which a request was MEANT
to be sent: a client that falls behind shows it instead of flattering the server (coordinated omission). What remains of that,
the lag between meant and sent, is reported, and so is the CPU time of the client itself.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from apportion.bench.http_stream import HttpClient
from apportion.bench.workload import Sample
from apportion.core.errors import BenchmarkFailed

ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}


@dataclass(slots=True)
class Record:
    """One request as the client saw it. Times are seconds since the start of the run.

    intended: when the schedule wanted it sent; in a closed loop, when a place came free. token_times: arrivals of chunks that
    carry tokens. end: of the last chunk. num_*_tokens: the server's count, None where it sent no usage. error: why it failed.
    """

    prompt_len: int
    output_len: int | None
    intended: float
    sent: float = 0.0
    token_times: list[float] = field(default_factory=list)
    end: float = 0.0
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go and what they all say. backend: a key of ENDPOINTS. extra_body: further fields of every request."""

    backend: str = "openai"
    endpoint: str | None = None
    temperature: float | None = 0.0
    ignore_eos: bool = True
    extra_body: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return self.endpoint or ENDPOINTS[self.backend]

    def body(self, sample: Sample, model: str) -> bytes:
        chat = self.backend == "openai-chat"
        content = {"messages": [{"role": "user", "content": sample.prompt}]} if chat else {"prompt": sample.prompt}
        fields: dict[str, Any] = {"model": model, **content, "stream": True, "stream_options": {"include_usage": True}}
        if sample.output_len is not None:
            fields["max_completion_tokens" if chat else "max_tokens"] = sample.output_len
        if self.temperature is not None:
            fields["temperature"] = self.temperature
        if self.ignore_eos:
            fields["ignore_eos"] = True
        return json.dumps(fields | self.extra_body).encode()


@dataclass(frozen=True, slots=True)
class Run:
    """duration: seconds from the start to the last answer. client_cpu: seconds of this process over that time."""

    records: list[Record]
    duration: float
    client_cpu: float


async def wait_ready(client: HttpClient, timeout: float) -> str:
    """The id of the first model once GET /v1/models answers. Errors: BenchmarkFailed with the last answer after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            async with asyncio.timeout(max(1.0, deadline - time.monotonic())):
                reply = await client.request("GET", "/v1/models")
            if reply.status == 200:
                return str(json.loads(reply.body)["data"][0]["id"])
            problem = f"status {reply.status}: {reply.body[:200].decode(errors='replace')}"
            if 400 <= reply.status < 500:
                raise BenchmarkFailed(f"GET /v1/models was refused with {problem}")
        except (OSError, TimeoutError) as error:
            problem = str(error) or type(error).__name__
        except (ValueError, KeyError, IndexError, TypeError):
            raise BenchmarkFailed(f"GET /v1/models lists no model: {reply.body[:200].decode(errors='replace')}") from None
        if time.monotonic() >= deadline:
            raise BenchmarkFailed(f"the server at {client.host}:{client.port} is not ready after {timeout:g} s: {problem}")
        await asyncio.sleep(0.2)


async def offer_load(
    client: HttpClient,
    target: Target,
    model: str,
    samples: Sequence[Sample],
    arrivals: Sequence[float] | None,
    *,
    max_concurrency: int | None = None,
    request_timeout: float = 600.0,
    on_done: Callable[[Record], None] = lambda record: None,
) -> Run:
    """Send samples[i] at arrivals[i] seconds. arrivals None: a closed loop, the next one whenever fewer than max_concurrency run.

    With both, a request that has to wait for a place is late, and its wait counts as latency. Failures are recorded, never raised.
    """
    bodies = [target.body(sample, model) for sample in samples]
    places = asyncio.Semaphore(max_concurrency or len(samples) or 1)
    records: list[Record] = []
    gc.collect()
    gc.freeze()
    cpu, start = time.process_time(), time.perf_counter()

    async def send(record: Record, body: bytes) -> None:
        try:
            async with asyncio.timeout(request_timeout):
                await _stream(client, target, body, record, start)
        except TimeoutError:
            record.error = f"no complete answer within {request_timeout:g} s"
        except OSError as error:
            record.error = f"{type(error).__name__}: {error}"
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            record.error = f"the server sent what is no OpenAI event: {type(error).__name__}: {error}"
        finally:
            places.release()
        record.end = record.end or time.perf_counter() - start
        on_done(record)

    async with asyncio.TaskGroup() as tasks:
        for i, (sample, body) in enumerate(zip(samples, bodies, strict=True)):
            if arrivals is not None and (wait := start + arrivals[i] - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            await places.acquire()
            due = time.perf_counter() - start if arrivals is None else arrivals[i]
            record = Record(sample.prompt_len, sample.output_len, due)
            records.append(record)
            tasks.create_task(send(record, body))
    gc.unfreeze()
    return Run(records, time.perf_counter() - start, time.process_time() - cpu)


async def _stream(client: HttpClient, target: Target, body: bytes, record: Record, start: float) -> None:
    """One request, its events noted in `record` as they come."""
    complete = False

    def on_event(now: float, payload: bytes) -> None:
        nonlocal complete
        if payload == b"[DONE]":
            complete = True
            return
        event = json.loads(payload)
        if "error" in event:
            record.error = error_text(event)
        if usage := event.get("usage"):
            record.num_prompt_tokens, record.num_output_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if choices := event.get("choices"):
            record.end = now - start
            if carries_token(choices[0]):
                record.token_times.append(record.end)
            record.finish_reason = choices[0].get("finish_reason") or record.finish_reason

    record.sent = time.perf_counter() - start
    reply = await client.request("POST", target.path, body, on_event)
    if reply.status != 200:
        record.error = f"status {reply.status}: {error_text(_parse(reply.body))}"
    elif record.error is None and not (complete or record.finish_reason):
        record.error = "the stream ended without [DONE] and without a finish_reason"
    elif record.error is None and not record.token_times:
        record.token_times.append(record.end)  # an end-of-text token alone


def carries_token(choice: dict[str, Any]) -> bool:
    """Whether a chunk brings tokens: not one that only opens the message with a role, and not one that only closes it.

    An empty text counts where the answer goes on: its token ended within a character.
    """
    delta = choice.get("delta")
    if delta is None:
        return bool(choice.get("text")) or choice.get("finish_reason") is None
    text = any(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls"))
    return text or (choice.get("finish_reason") is None and "role" not in delta)


def error_text(body: Any) -> str:
    """The message of OpenAI's error shape, or what there is instead."""
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)[:500]


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")
