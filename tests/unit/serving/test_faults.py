"""What must not bring the server down, done for real: dead processes, killed clients, slow readers, floods."""

from __future__ import annotations

import json
import os
import signal
import socket
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest

from tests.unit.serving.conftest import metric

LONG = {"model": "apportion", "prompt": "Once upon a time", "max_tokens": 1900, "ignore_eos": True}
LONG_TYPED = {"model": "apportion", "prompt": "Once upon a time", "max_tokens": 1900, "extra_body": {"ignore_eos": True}}


def raw_request(server, body: dict, path: str = "/v1/completions") -> socket.socket:
    """A connection on which a request was sent and nothing read."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    connection.sendall(head.encode() + payload)
    return connection


def is_quiet(server) -> bool:
    """Whether the engine has nothing to do and every block is accounted for."""
    return metric(server, "num_requests_running") == 0 and metric(server, "num_requests_waiting") == 0


def assert_no_leak(server) -> None:
    server.wait(lambda: is_quiet(server), "the engine is idle")
    assert server.post("/debug/integrity").status_code == 200, server.log


def test_clients_that_go_away_leave_no_block_behind(server):
    """A thousand of them, in the middle of their streams."""

    def leave(i: int) -> None:
        connection = raw_request(server, {**LONG, "stream": i % 4 != 0, "prompt": f"Story number {i}"})
        if i % 4:
            connection.recv(1 + i % 700)
        else:
            time.sleep(0.002 * (i % 5))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # a reset, as from a process that was killed
        connection.close()

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(leave, range(1000)))
    assert_no_leak(server)
    assert metric(server, "kv_cache_usage_perc") == 0


def test_a_client_that_leaves_frees_its_blocks_within_a_step(server):
    connection = raw_request(server, {**LONG, "stream": True})
    connection.recv(4096)
    server.wait(lambda: metric(server, "num_requests_running") == 1, "it runs")
    connection.close()
    start = time.monotonic()
    server.wait(lambda: is_quiet(server), "it is gone")
    assert time.monotonic() - start < 3  # a heartbeat is told every half second; the whole answer would take longer
    assert_no_leak(server)


def test_a_slow_reader_gets_everything(server):
    connection = raw_request(server, {**LONG, "max_tokens": 1500, "stream": True, "logprobs": 5, "stream_options": {"include_usage": True}})
    time.sleep(2)  # the answer is larger than the socket's buffers
    data = b""
    while b"data: [DONE]" not in data:
        piece = connection.recv(2000)
        assert piece, data[-500:]
        data += piece
    assert b'"completion_tokens":1500' in data
    assert_no_leak(server)


def test_the_engine_killed_under_load(start_server):
    """Every client gets a complete answer or an error within a second of the death; the service comes back; the count adds up."""
    server = start_server("--max-engine-restarts", "2")
    outcomes: list[tuple[str, float]] = []
    started = threading.Barrier(9)

    def ask(stream: bool) -> None:
        client = server.client()
        started.wait()
        try:
            answer = client.completions.create(**LONG_TYPED, n=4, stream=stream)
            last = list(answer)[-1] if stream else answer
            outcomes.append((last.choices[0].finish_reason, time.monotonic()))
        except openai.InternalServerError as error:
            assert error.status_code == 503 and "SIGKILL" in str(error)
            outcomes.append(("503", time.monotonic()))
        except openai.APIError as error:  # the stream had begun: its error came as an event
            assert "SIGKILL" in str(error)
            outcomes.append(("event", time.monotonic()))

    threads = [threading.Thread(target=ask, args=(i % 2 == 0,)) for i in range(8)]
    for thread in threads:
        thread.start()
    started.wait()
    server.wait(lambda: metric(server, "num_requests_running") >= 8, "the load has arrived")
    killed = time.monotonic()
    server.engine.kill()
    for thread in threads:
        thread.join(30)
    assert len(outcomes) == 8
    late = [end - killed for outcome, end in outcomes if outcome in ("503", "event")]
    assert late and max(late) < 1.0 + 2.0  # one second, and what a machine full of other tests adds
    server.wait_ready()
    assert server.client().completions.create(model="apportion", prompt="Again", max_tokens=2).choices[0].text
    assert metric(server, "engine_deaths_total") == 1


def test_a_worker_that_is_killed_costs_no_request(start_server):
    """Two processes share each layer; without one of them the engine starts both again, and computes once more from the tokens it has."""
    server = start_server("--tensor-parallel-size", "2", "--num-threads", "2")
    asked = {"model": "apportion", "prompt": "In the beginning", "max_tokens": 120, "temperature": 0, "extra_body": {"ignore_eos": True}}
    stream = iter(server.client().completions.create(**asked, stream=True))
    text = next(stream).choices[0].text
    workers = [p for p in server.engine.children(recursive=True) if "apportion.engine.worker" in p.cmdline()]
    assert len(workers) == 2
    workers[1].kill()
    chunks = [chunk.choices[0] for chunk in stream]
    assert chunks[-1].finish_reason == "length" and metric(server, "generation_tokens_total") == 120
    again = server.client().completions.create(**asked).choices[0].text
    assert text + "".join(chunk.text for chunk in chunks) == again
    assert metric(server, "engine_deaths_total") == 0
    assert_no_leak(server)


def test_requests_while_the_engine_starts_again_are_told_so(server):
    server.engine.kill()
    server.wait(lambda: server.get("/readyz").status_code == 503, "the death is noticed")
    assert server.get("/livez").status_code == 200
    answer = server.post("/v1/completions", json={"prompt": "x"})
    assert answer.status_code in (200, 503)
    if answer.status_code == 503:
        assert answer.headers["retry-after"] and "SIGKILL" in answer.json()["error"]["message"]
    server.wait_ready()


def test_an_engine_that_keeps_dying_ends_the_server(start_server):
    server = start_server("--max-engine-restarts", "1")
    for _ in range(2):
        server.wait_ready()
        server.engine.kill()
        time.sleep(0.3)
    assert server.process.wait(30) == 3
    assert "SIGKILL" in server.log.splitlines()[-1]


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_reason(start_server, tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "none"}')
    server = start_server(str(tmp_path), wait=False)
    assert server.process.wait(60) == 3
    assert "NoSuchModel" in server.log.splitlines()[-1]


def test_the_engine_ends_when_the_server_is_killed(start_server):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # a socket's path must be short
        server = start_server(env={"TMPDIR": folder})
        engine = server.engine
        assert os.listdir(folder)
        server.process.kill()
        server.process.wait()
        _, alive = psutil.wait_procs([engine], timeout=30)
        assert not alive and not os.listdir(folder)


def test_a_term_signal_lets_running_requests_finish(start_server):
    server = start_server()
    with server.client().completions.create(
        model="apportion", prompt="Go", max_tokens=600, extra_body={"ignore_eos": True}, stream=True
    ) as chunks:
        next(iter(chunks))
        server.process.terminate()
        reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons[-1] == "length"
    assert server.process.wait(30) == 0


def test_a_second_signal_ends_it_at_once(start_server):
    server = start_server("--shutdown-timeout", "60")
    connection = raw_request(server, {**LONG, "n": 64, "stream": True})
    connection.recv(4096)
    server.process.terminate()
    time.sleep(0.5)
    start = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(15)
    assert time.monotonic() - start < 10


def test_a_port_in_use_is_one_sentence(server, start_server):
    port = server.url.rpartition(":")[2]
    second = start_server("--port", port, wait=False)
    assert second.process.wait(30) == 2
    assert second.log.strip() == f"apportion: cannot listen on 127.0.0.1:{port}: Address already in use"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_for_logs_costs_only_the_logs(start_server, tmp_path):
    probe = socket.socket()
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
    probe.close()
    server = start_server("--port", str(port), "--log-file", "/dev/full", wait=False)
    server.url = f"http://127.0.0.1:{port}"
    server.wait_ready()
    assert server.client().completions.create(model="apportion", prompt="x", max_tokens=2).choices[0].text
    assert metric(server, "lost_log_lines_total") > 0


def test_the_queue_has_an_end(start_server):
    server = start_server("--max-num-seqs", "2", "--max-queued-requests", "2")
    open_connections = [raw_request(server, {**LONG, "stream": True}) for _ in range(4)]
    server.wait(lambda: metric(server, "num_requests_running") == 2, "two run")
    refused = server.post("/v1/completions", json=LONG)
    assert refused.status_code == 429
    assert refused.headers["retry-after"] and refused.json()["error"]["code"] == "queue_full"
    for connection in open_connections:
        connection.close()
    assert_no_leak(server)
    assert server.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200


def test_a_request_takes_no_longer_than_allowed(start_server):
    server = start_server("--request-timeout", "0.3", "--body-timeout", "0.5", "--max-body-bytes", "10k")
    late = server.post("/v1/completions", json={**LONG, "n": 16})
    assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"
    with httpx.stream("POST", server.url + "/v1/completions", json={**LONG, "n": 16, "stream": True}, timeout=60) as stream:
        text = stream.read().decode()
    assert '"code":"timeout"' in text and text.endswith("data: [DONE]\n\n")
    assert_no_leak(server)

    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")

    large = server.post("/v1/completions", json={"prompt": "x" * 20_000})
    assert large.status_code == 413
    chunked = server.post("/v1/completions", content=iter([b" " * 6000, b" " * 6000]), headers={"content-type": "application/json"})
    assert chunked.status_code == 413
