"""Running the server: keys, metrics, CORS, TLS, the configuration file, logs, priorities, probes, draining."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.unit.serving.conftest import ServerProcess, metric
from tests.unit.serving.test_faults import LONG, assert_no_leak, raw_request

KEY = {"authorization": "Bearer secret-2"}
FAULT = """
import os, sys
if "apportion.serving.engine_process" in sys.orig_argv:
    from apportion.engine.engine import Engine
    step = Engine.step
    def broken(self, timeout_s):
        if os.path.exists(os.environ["FAULT"]) and self.has_unfinished:
            os.remove(os.environ["FAULT"])
            raise ZeroDivisionError("the planted fault")
        return step(self, timeout_s)
    Engine.step = broken
"""


@pytest.fixture(scope="module")
def server(start_server):
    """Its own: it is to be harmed."""
    return start_server()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def guarded(start_server, tmp_path_factory) -> ServerProcess:
    """A server that a file configures: keys, CORS, metrics of their own, JSON logs, priorities, one request at a time."""
    file = tmp_path_factory.mktemp("config") / "serve.yaml"
    port = free_port()
    file.write_text(
        f"""
        api-key: [secret-1, secret-2]
        allowed_origins: ["https://chat.example"]
        metrics-port: {port}
        metrics-prefix: vllm
        log-format: json
        scheduling-policy: priority
        max-num-seqs: 7
        enable-prefix-caching: false
        trust-request-chat-template: true
        """
    )
    server = start_server("--config", str(file), "--max-num-seqs", "1")  # what the command line says wins
    server.metrics_url = f"http://127.0.0.1:{port}/metrics"
    return server


def gauge(server: ServerProcess, name: str) -> float:
    families = text_string_to_metric_families(httpx.get(server.metrics_url).text)
    return sum(s.value for f in families for s in f.samples if s.name == name)


class TestAccess:
    def test_a_key_opens_the_api(self, guarded):
        body = {"prompt": "x", "max_tokens": 1}
        for headers in ({}, {"authorization": "Bearer secret-3"}, {"authorization": "secret-1"}, {"x-api-key": "secret"}):
            refused = guarded.post("/v1/completions", json=body, headers=headers)
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        for headers in (KEY, {"authorization": "bearer secret-1"}, {"x-api-key": "secret-1"}):
            assert guarded.post("/v1/completions", json=body, headers=headers).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            guarded.client().models.list()

    def test_nothing_but_probes_and_the_page_is_open(self, guarded):
        paths = {*guarded.get("/openapi.json", headers=KEY).json()["paths"], "/", "/dashboard/page.css", "/stats"}
        open_paths = {p for p in paths if "{" not in p and guarded.get(p).status_code != 401}
        assert open_paths == {"/livez", "/readyz", "/health", "/ping", "/", "/dashboard/page.css"}
        assert guarded.get("/openapi.json").status_code == guarded.get("/nothing").status_code == 401
        assert guarded.get("/docs", headers=KEY).status_code == 404  # FastAPI's is fetched from elsewhere

    def test_cors(self, guarded):
        asks = {
            "origin": "https://chat.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization",
        }
        answer = httpx.options(guarded.url + "/v1/completions", headers=asks)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://chat.example"
        other = httpx.options(guarded.url + "/v1/completions", headers={**asks, "origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        refused = guarded.post("/v1/completions", json={}, headers={"origin": "https://chat.example"})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://chat.example"

    def test_metrics_stand_alone_under_another_prefix(self, guarded):
        assert guarded.get("/metrics", headers=KEY).status_code == 404
        guarded.post("/v1/completions", json={"prompt": "x", "max_tokens": 3, "ignore_eos": True}, headers=KEY)
        names = {f.name for f in text_string_to_metric_families(httpx.get(guarded.metrics_url).text)}
        assert {"vllm:time_to_first_token_seconds", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"} <= names
        assert gauge(guarded, "vllm:generation_tokens_total") >= 3


class TestLogs:
    def test_a_line_names_its_request(self, guarded):
        answer = guarded.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers={**KEY, "x-request-id": "abc.1"})
        assert answer.headers["x-request-id"] == "abc.1" and answer.json()["id"] == "cmpl-abc.1"
        odd = guarded.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers={**KEY, "x-request-id": 'a"b c'})
        assert len(odd.headers["x-request-id"]) == 32
        guarded.wait(lambda: "abc.1" in guarded.log, "it is logged", 10)
        lines = [json.loads(line) for line in guarded.log.splitlines()]  # those of both processes
        assert {line["process"] for line in lines} == {"api", "engine"}
        [line] = [line for line in lines if line.get("request_id") == "abc.1"]
        assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200) and line["ms"] > 0


def test_a_smaller_priority_runs_earlier(guarded):
    ended: list[str] = []

    def ask(name: str, priority: int, max_tokens: int) -> None:
        body = {"prompt": name, "max_tokens": max_tokens, "ignore_eos": True, "priority": priority}
        assert guarded.post("/v1/completions", json=body, headers=KEY).status_code == 200
        ended.append(name)

    asked = (("first", 0, 1900), ("late", 9, 200), ("early", 1, 200))
    threads = [threading.Thread(target=ask, args=arguments) for arguments in asked]
    threads[0].start()
    guarded.wait(lambda: gauge(guarded, "vllm:num_requests_running") == 1, "the first runs")
    for thread in threads[1:]:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join(120)
    assert ended == ["first", "early", "late"]


def test_templates_of_requests_where_trusted(guarded, start_server):
    chat = {"messages": [{"role": "user", "content": "Hi"}], "chat_template": "A: {{ messages[0].content }}"}
    tokens = guarded.post("/tokenize", json=chat, headers=KEY).json()["tokens"]
    assert guarded.post("/detokenize", json={"tokens": tokens}, headers=KEY).json()["prompt"].endswith("A: Hi")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_tls(start_server, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            key,
            "-out",
            certificate,
            "-days",
            "2",
            "-subj",
            "/CN=x",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
        ],
        check=True,
        capture_output=True,
    )
    server = start_server("--ssl-keyfile", str(key), "--ssl-certfile", str(certificate), wait=False)
    server.url = server._find_url()
    assert server.url.startswith("https://")
    with httpx.Client(verify=ssl.create_default_context(cafile=certificate), timeout=60) as trusting:
        server.wait(lambda: trusting.get(server.url + "/readyz").status_code == 200, "it is ready")
        assert trusting.post(server.url + "/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url + "/livez")
    wrong = start_server("--ssl-keyfile", str(key), "--ssl-certfile", str(tmp_path / "gone.pem"), wait=False)
    assert wrong.process.wait(60) == 2 and "TLS cannot be set up" in wrong.log.splitlines()[-1]


@pytest.mark.parametrize("content", ["- a list", "port: {", "no-such-flag: 3", "port: many"])
def test_a_configuration_that_makes_no_sense_is_refused(start_server, tmp_path, content):
    (tmp_path / "serve.yaml").write_text(content)
    server = start_server("--config", str(tmp_path / "serve.yaml"), wait=False)
    assert server.process.wait(30) == 2
    assert "Traceback" not in server.log and "error:" in server.log


class TestProbes:
    def test_an_engine_that_hangs_is_not_ready(self, server):
        server.engine.send_signal(signal.SIGSTOP)
        try:
            server.wait(lambda: server.get("/readyz").status_code == 503, "the probe notices", 20)
            assert "has not answered for" in server.get("/health").json()["error"]["message"]
            assert server.get("/livez").status_code == 200
        finally:
            server.engine.send_signal(signal.SIGCONT)
        server.wait_ready()
        assert server.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200

    def test_a_busy_engine_stays_ready(self, server):
        connection = raw_request(server, {**LONG, "stream": True, "n": 8})
        connection.recv(4096)
        assert all(server.get("/readyz").status_code == 200 for _ in range(20))
        connection.close()
        assert_no_leak(server)


def test_an_exception_of_the_engine_reaches_every_client(start_server, tmp_path):
    """Its type, message and last frames; then the service is back."""
    (tmp_path / "sitecustomize.py").write_text(FAULT)
    fault = tmp_path / "fault"
    environment = {"FAULT": str(fault), "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    server = start_server(env=environment)
    streams = [raw_request(server, {**LONG, "stream": True}) for _ in range(2)]
    for stream in streams:
        stream.recv(4096)
    whole = raw_request(server, LONG)
    server.wait(lambda: metric(server, "num_requests_running") == 3, "all run")
    fault.touch()
    for connection in (whole, *streams):
        data = b""
        while piece := connection.recv(65536):
            data += piece
            if b"[DONE]" in data or data.endswith(b"}"):
                break
        assert b"ZeroDivisionError" in data and b"the planted fault" in data and b"in broken" in data, data[-600:]
    assert b"data: [DONE]" in data
    server.wait_ready()
    assert server.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
    assert metric(server, "engine_deaths_total") == 1


def test_a_drain_that_takes_too_long_tells_those_it_ends(start_server):
    server = start_server("--shutdown-timeout", "1")
    asked = {**LONG, "n": 64}
    stream, whole = raw_request(server, {**asked, "stream": True}), raw_request(server, asked)
    stream.recv(100)
    server.process.terminate()
    start = time.monotonic()
    for connection in (stream, whole):
        data = b""
        while piece := connection.recv(2**20):
            data += piece
        assert b"the server is shutting down" in data, data[-300:]
    assert server.process.wait(30) == 0
    assert time.monotonic() - start < 25


def test_requests_of_a_model_that_is_unloaded_are_ended_and_told(server):
    connection = raw_request(server, {**LONG, "stream": True})
    connection.recv(4096)
    assert server.post("/v1/models/unload", json={"model": "apportion"}).json()["state"] == "unloaded"
    data = b""
    while b"[DONE]" not in data:
        data += connection.recv(65536)
    assert b'"finish_reason":"abort"' in data
    assert server.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200  # which loads it again
    assert_no_leak(server)


def test_a_tokenizer_of_another_kind_is_converted_by_the_engine(start_server, shared_data, bundled_model, tmp_path):
    """The API process reads what the engine process has written: it has no transformers."""
    pytest.importorskip("sentencepiece")
    folder = tmp_path / "old"
    shutil.copytree(bundled_model, folder, ignore=shutil.ignore_patterns("tokenizer*", "__pycache__"))
    shutil.copy(shared_data("tok-mistral/tokenizer.model.v1"), folder / "tokenizer.model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 32000}))
    server = start_server(str(folder), "--load-format", "dummy")
    tokens = server.post("/tokenize", json={"prompt": "The sun and the moon"}).json()["tokens"]
    assert server.post("/detokenize", json={"tokens": tokens}).json()["prompt"].strip().endswith("The sun and the moon")
    assert server.post("/v1/completions", json={"prompt": "The", "max_tokens": 3, "ignore_eos": True}).status_code == 200
    assert not (folder / "tokenizer.json").exists()


def test_a_unix_socket(start_server):
    with tempfile.TemporaryDirectory() as folder:  # a socket's path must be short
        path = Path(folder) / "s"
        server = start_server("--uds", str(path), wait=False)
        server.wait(lambda: " ready: " in server.log, "it is ready")
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://server", timeout=60) as client:
            assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
        server.stop()
