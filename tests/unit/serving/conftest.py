"""A server in processes of its own, over the bundled model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

START_TIMEOUT_S = 120  # the machine may be busy with other tests


class ServerProcess:
    """`apportion serve` with `arguments`; ready when the constructor returns. log: what it wrote so far."""

    def __init__(self, folder: Path, *arguments: str, wait: bool = True, env: dict[str, str] | None = None) -> None:
        self.log_path = folder / f"server-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "apportion.cli.main", "serve", "--port", "0", *arguments]
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": ":".join(sys.path), **(env or {})}
            )
        self.url = self._find_url() if wait else ""
        if wait:
            self.wait_ready()

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    @property
    def engine(self) -> psutil.Process:
        """The engine process of now."""
        [engine] = [p for p in psutil.Process(self.process.pid).children() if "apportion.serving.engine_process" in p.cmdline()]
        return engine

    def client(self, **options: object) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 120, **options})

    def post(self, path: str, **options: object) -> httpx.Response:
        return httpx.post(self.url + path, **{"timeout": 120, **options})

    def get(self, path: str, **options: object) -> httpx.Response:
        return httpx.get(self.url + path, **{"timeout": 60, **options})

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        self.wait(lambda: self.get("/readyz").status_code == 200, "the server is ready", timeout_s)

    def wait(self, condition: Callable[[], bool], what: str, timeout_s: float = START_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                if condition():
                    return
            except httpx.TransportError:
                pass
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log}")
            time.sleep(0.05)
        raise AssertionError(f"not within {timeout_s} s: {what}\n{self.log}")

    def stop(self) -> int:
        """Ends the server kindly; returns its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def _find_url(self) -> str:
        found: list[str] = []

        def look() -> bool:
            found.extend(re.findall(r"serving (https?://[^\s\"]+)", self.log))
            return bool(found)

        self.wait(look, "the server says where it listens")
        return found[0]


def metric(server: ServerProcess, name: str, **labels: str) -> float:
    """The value of a metric, summed over what `labels` leaves open; 0 where there is none. The name without its prefix."""
    families = text_string_to_metric_families(server.get("/metrics").text)
    samples = [s for f in families for s in f.samples if s.name.partition(":")[2] == name and labels.items() <= s.labels.items()]
    return sum(sample.value for sample in samples)


@contextmanager
def starting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ServerProcess]]:
    started: list[ServerProcess] = []

    def start(*arguments: str, **options: object) -> ServerProcess:
        started.append(ServerProcess(tmp_path_factory.mktemp("server"), *arguments, **options))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="module")
def start_server(tmp_path_factory) -> Iterator[Callable[..., ServerProcess]]:
    """A function that starts a server; all are ended after the module."""
    with starting(tmp_path_factory) as start:
        yield start


@pytest.fixture(scope="package")
def server(tmp_path_factory) -> Iterator[ServerProcess]:
    """One for all modules that do it no harm; those that do have one of their own."""
    with starting(tmp_path_factory) as start:
        yield start()


@pytest.fixture(scope="package")
def client(server) -> openai.OpenAI:
    return server.client()
