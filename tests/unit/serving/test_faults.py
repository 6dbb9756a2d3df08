"""What must not bring the server down, done for real: dead processes, killed clients, slow readers, floods."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx
import psutil
import pytest

from tests.unit.serving.conftest import metric

LONG = {"model": "apportion", "prompt": "Once upon a time", "max_tokens": 1900, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(start_server):
    """Its own: it is to be harmed."""
    return start_server()


def raw_request(server, body: dict, path: str = "/v1/completions", receive_buffer: int | None = None) -> socket.socket:
    """A connection on which a request was sent and nothing read. receive_buffer: bytes that the kernel takes in unread."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.settimeout(60)
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect((host, int(port)))
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    connection.sendall(head.encode() + payload)
    return connection


def is_quiet(server) -> bool:
    """Whether the engine has nothing to do and every block is accounted for."""
    return metric(server, "num_requests_running") == 0 and metric(server, "num_requests_waiting") == 0


async def until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    async with asyncio.timeout(timeout_s):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.02)


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


def events_of(connection: socket.socket) -> list[dict]:
    """The events of a stream, read a little at a time to its end."""
    data = b""
    while not data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        piece = connection.recv(2000)
        assert piece, data[-500:]
        data += piece
    return [json.loads(line[6:]) for line in data.splitlines() if line.startswith(b"data: {")]


def test_slow_readers_get_everything_and_hold_up_nobody(server):
    """What is not read waits in the API process, joined; the engine, and everybody else, go on."""
    asked = {**LONG, "max_tokens": 1200, "logprobs": 20, "seed": 3}
    [whole] = server.post("/v1/completions", json=asked).json()["choices"]
    readers = [raw_request(server, {**asked, "stream": True}, receive_buffer=4096) for _ in range(2)]
    server.wait(lambda: metric(server, "num_requests_running") == 2, "both run")
    server.wait(lambda: is_quiet(server), "the engine has finished what nobody has read")
    assert server.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
    for reader in readers:
        events = events_of(reader)
        choices = [event["choices"][0] for event in events]
        assert len(events) < 1200  # the answer is larger than the buffers of the sockets: part of it was joined
        assert "".join(choice["text"] for choice in choices) == whole["text"]
        assert [token for choice in choices for token in choice["logprobs"]["tokens"]] == whole["logprobs"]["tokens"]
        assert choices[-1]["finish_reason"] == "length"
    assert_no_leak(server)


CLIENTS, CHOICES = 24, 2
ASKED = {"model": "apportion", "prompt": "Once upon a time", "max_tokens": 80, "ignore_eos": True, "n": CHOICES}


@dataclass
class Tally:
    """What clients saw: whole answers, and requests that failed with their status (0: in a stream that had begun) and time."""

    complete: int = 0
    failed: list[tuple[int, str, float]] = field(default_factory=list)

    @property
    def started(self) -> int:
        return self.complete + len(self.failed)


async def ask_until(told: asyncio.Event, url: str, tally: Tally, streamed: bool) -> None:
    """One request after the other, each counted by how it ended."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        while not told.is_set():
            answer = await client.post("/v1/completions", json={**ASKED, "stream": streamed})
            if answer.status_code == 200 and (not streamed or '"error"' not in answer.text):
                reasons = re.findall(r'"finish_reason":"(\w+)"', answer.text)
                assert reasons == ["length"] * CHOICES and (not streamed or answer.text.endswith("data: [DONE]\n\n")), answer.text[-300:]
                tally.complete += 1
            else:
                tally.failed.append((0 if answer.status_code == 200 else answer.status_code, answer.text[-2000:], time.monotonic()))
                await asyncio.sleep(0.1)  # as a client would that is told to try again


def test_the_engine_killed_under_load(start_server):
    """Every client gets a complete answer or an error within a second of the death; the service comes back; every count adds up."""
    server = start_server("--max-engine-restarts", "2")
    tally = Tally()

    async def load() -> float:
        told = asyncio.Event()
        async with asyncio.TaskGroup() as clients:
            for i in range(CLIENTS):
                clients.create_task(ask_until(told, server.url, tally, streamed=i % 2 == 0))
            await until(lambda: tally.complete >= CLIENTS // 2 and metric(server, "num_requests_running") >= CLIENTS)
            killed = time.monotonic()
            server.engine.kill()
            await until(lambda: metric(server, "engine_deaths_total") == 1 and server.get("/readyz").status_code == 200)
            before = tally.complete
            await until(lambda: tally.complete >= before + CLIENTS // 2)
            told.set()
        return killed

    killed = asyncio.run(load())
    lost = [end - killed for _, text, end in tally.failed if "the engine process died" in text]
    turned_away = [text for _, text, _ in tally.failed if "the engine process died" not in text]
    assert lost and max(lost) < 1.0, lost
    assert {status for status, _, _ in tally.failed} <= {0, 503}
    assert all("SIGKILL" in text for _, text, _ in tally.failed)
    server.wait(lambda: is_quiet(server), "the engine is idle")
    assert metric(server, "http_requests_total", path="/v1/completions") == tally.started
    ended = {reason: metric(server, "request_success_total", finished_reason=reason) for reason in ("length", "abort", "stop", "error")}
    assert sum(ended.values()) == CHOICES * (tally.started - len(turned_away)), (ended, tally.started, len(turned_away))
    assert CHOICES * tally.complete <= ended["length"] <= CHOICES * tally.complete + (CHOICES - 1) * len(lost)
    assert ended["stop"] == ended["error"] == 0
    assert metric(server, "engine_deaths_total") == 1
    assert_no_leak(server)
    assert metric(server, "kv_cache_usage_perc") == 0


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


def test_the_queue_of_each_model_has_an_end(start_server, bundled_model):
    server = start_server(f"a={bundled_model}", f"b={bundled_model}", "--max-num-seqs", "2", "--max-queued-requests", "2")
    short = {"max_tokens": 2, "ignore_eos": True}
    for body in ({"prompt": ["x"] * 5}, {"prompt": "x", "n": 5}, {"prompt": [[1], [2], [3]], "n": 2}):  # also where nobody waits
        refused = server.post("/v1/completions", json={**short, **body})
        assert refused.status_code == 400 and "sequences, its prompts times n" in refused.json()["error"]["message"], refused.text
    assert server.post("/v1/embeddings", json={"input": ["x"] * 5}).status_code == 400
    assert len(server.post("/v1/completions", json={**short, "prompt": ["x"] * 4}).json()["choices"]) == 4

    open_connections = [raw_request(server, {**LONG, "model": "a", "stream": True}) for _ in range(4)]
    server.wait(lambda: metric(server, "num_requests_running", model_name="a") == 2, "two run")
    refused = server.post("/v1/completions", json={**LONG, "model": "a"})
    assert refused.status_code == 429
    assert refused.headers["retry-after"] and refused.json()["error"]["code"] == "queue_full"
    assert server.post("/v1/completions", json={**short, "model": "b", "prompt": "x"}).status_code == 200  # whose queue is empty
    for connection in open_connections:
        connection.close()
    assert_no_leak(server)
    assert server.post("/v1/completions", json={**short, "model": "a", "prompt": "x"}).status_code == 200


def test_waiting_for_the_engine_counts_in_the_time_of_a_request(start_server, bundled_model, tmp_path):
    """For a model to be loaded, and for the request to be taken in."""
    for name in ("first", "second"):
        (tmp_path / name).symlink_to(bundled_model)
    server = start_server("--models-dir", str(tmp_path), "--request-timeout", "0.4")
    server.engine.send_signal(signal.SIGSTOP)
    try:
        for model, stream in itertools.product(("first", "second"), (False, True)):
            start = time.monotonic()
            late = server.post("/v1/completions", json={"model": model, "prompt": "x", "stream": stream})
            assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"
            assert 0.3 < time.monotonic() - start < 10
    finally:
        server.engine.send_signal(signal.SIGCONT)
    assert_no_leak(server)


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
