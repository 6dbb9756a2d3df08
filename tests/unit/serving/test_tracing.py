"""Spans of requests, as a collector receives them."""

from __future__ import annotations

import gzip
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from apportion.core.errors import InvalidParameter, Unsupported
from apportion.serving.tracing import Tracer

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """An OTLP endpoint over HTTP; spans: what arrived."""

    def __init__(self) -> None:
        requests = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
        self.spans: list = []
        self.paths: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                message = requests.ExportTraceServiceRequest.FromString(body)
                collector.paths.add(self.path)
                collector.spans += [span for r in message.resource_spans for scope in r.scope_spans for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def attributes(self, request_id: str) -> dict:
        [span] = [s for s in self.spans if any(a.key == "gen_ai.request.id" and a.value.string_value == request_id for a in s.attributes)]
        return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes} | {"span": span}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.shutdown()


def test_requests_become_spans(collector, start_server):
    server = start_server("--otlp-traces-endpoint", collector.url)
    body = {"prompt": "Once upon", "max_tokens": 7, "temperature": 0.5, "ignore_eos": True}
    for name, more in (("whole", {}), ("streamed", {"stream": True})):
        headers = {"x-request-id": name, "traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
        assert server.post("/v1/completions", json={**body, **more}, headers=headers).status_code == 200
    assert server.post("/v1/completions", json={"prompt": [999999999]}, headers={"x-request-id": "refused"}).status_code == 400
    assert server.stop() == 0  # what waits is sent
    assert collector.paths == {"/v1/traces"}
    for name in ("whole", "streamed"):
        span = collector.attributes(name)
        assert span["gen_ai.usage.output_tokens"] == 7 and span["gen_ai.usage.input_tokens"] > 0
        assert span["gen_ai.request.model"] == "apportion" and span["gen_ai.request.temperature"] == 0.5
        assert 0 < span["gen_ai.latency.time_to_first_token"] <= span["gen_ai.latency.e2e"] < 60
        assert span["span"].trace_id.hex() == TRACE_ID and span["span"].parent_span_id.hex() == PARENT_ID
        assert 0 < span["span"].end_time_unix_nano - span["span"].start_time_unix_nano < 60e9
        assert span["span"].status.code == 0
    refused = collector.attributes("refused")["span"]
    assert refused.status.code == 2 and refused.status.message == "refused"


def test_a_collector_that_is_away_costs_no_request(start_server):
    pytest.importorskip("opentelemetry.sdk")
    server = start_server("--otlp-traces-endpoint", "http://127.0.0.1:9")
    assert server.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
    assert server.stop() == 0


def test_it_is_an_error_where_it_cannot_be_done(monkeypatch):
    with pytest.raises(InvalidParameter, match="URL"):
        Tracer("localhost:4317", "1")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(Unsupported, match=r"pip install '\.\[otel\]'"):
        Tracer("http://127.0.0.1:4318", "1")
