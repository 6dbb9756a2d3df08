"""A span of each generating request, sent by OTLP over HTTP. Attributes are OpenTelemetry's for generative AI, latencies named as vLLM's.

Spans are sent by a thread of the SDK's: a collector that is slow or away costs spans, never requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from apportion.core.errors import InvalidParameter, Unsupported
from apportion.serving.messages import Generate
from apportion.serving.stream import Stream

CONTEXT_HEADERS = ("traceparent", "tracestate")
EXPORT_TIMEOUT_S = 2.0
SPAN_NAME = "llm_request"


def trace_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Those that say which trace a request belongs to (W3C trace context)."""
    return {name: headers[name] for name in CONTEXT_HEADERS if name in headers}


class Tracer:
    """endpoint: of the collector; /v1/traces unless it has a path of its own.

    Errors: InvalidParameter for what is no URL; Unsupported where OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str, version: str) -> None:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InvalidParameter(f"otlp_traces_endpoint must be an http(s) URL such as http://127.0.0.1:4318, got {endpoint!r}")
        url = endpoint if parts.path.strip("/") else f"{endpoint.rstrip('/')}/v1/traces"
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace import SpanKind, Status, StatusCode
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise Unsupported(f"otlp_traces_endpoint needs OpenTelemetry ({error}): pip install '.[otel]'") from error
        self._provider = TracerProvider(resource=Resource.create({"service.name": "apportion", "service.version": version}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url, timeout=EXPORT_TIMEOUT_S)))
        self._tracer = self._provider.get_tracer("apportion.serving", version)
        self._extract = TraceContextTextMapPropagator().extract
        self._server_kind = SpanKind.SERVER
        self._failure: Callable[[str], Any] = lambda description: Status(StatusCode.ERROR, description)

    def record(
        self, request_id: str, arrival_s: float, headers: Mapping[str, str], requests: Sequence[Generate], stream: Stream | None
    ) -> None:
        """The span of an HTTP request that has just ended. arrival_s: reading of time.monotonic. stream: None when it was refused."""
        end_ns = time.time_ns()
        elapsed_s = time.monotonic() - arrival_s
        span = self._tracer.start_span(
            SPAN_NAME,
            context=self._extract(headers),
            kind=self._server_kind,
            start_time=end_ns - int(elapsed_s * 1e9),
            attributes=_attributes(request_id, elapsed_s, requests, stream),
        )
        if failure := _failure(stream):
            span.set_status(self._failure(failure))
        span.end(end_ns)

    def close(self) -> None:
        """Send what waits, for as long as one export may take."""
        self._provider.shutdown()


def _failure(stream: Stream | None) -> str | None:
    if stream is None:
        return "refused"
    if stream.error is not None:
        return str(stream.error)
    return None if stream.is_done else "aborted"


def _attributes(request_id: str, elapsed_s: float, requests: Sequence[Generate], stream: Stream | None) -> dict[str, Any]:
    first = requests[0]
    params = first.params
    attributes: dict[str, Any] = {
        "gen_ai.request.id": request_id,
        "gen_ai.request.model": first.model,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.choice.count": params.n * len(requests),
        "gen_ai.usage.input_tokens": sum(len(request.prompt_token_ids) for request in requests),
        "gen_ai.usage.output_tokens": 0 if stream is None else sum(stream.num_tokens),
        "gen_ai.latency.e2e": elapsed_s,
    }
    end = None if stream is None else stream.ends.get(first.request_id)
    if end is not None and end.queue_s is not None and end.prefill_s is not None:
        attributes["gen_ai.latency.time_in_queue"] = end.queue_s
        attributes["gen_ai.latency.time_in_model_prefill"] = end.prefill_s
        attributes["gen_ai.latency.time_to_first_token"] = end.queue_s + end.prefill_s
        attributes["gen_ai.latency.time_in_model_decode"] = end.decode_s
    return {name: value for name, value in attributes.items() if value is not None}
