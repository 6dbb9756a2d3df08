"""Batch files through `apportion run-batch`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil


def batch(folder: Path, lines: list, *arguments: str) -> subprocess.Popen:
    source = folder / "in.jsonl"
    source.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    command = [sys.executable, "-m", "apportion.cli.main", "run-batch", "-i", str(source), "-o", str(folder / "out.jsonl"), *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)})


def answers(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def ask(custom_id: str, url: str = "/v1/completions", **body) -> dict:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def test_every_line_is_answered(tmp_path):
    messages = [{"role": "user", "content": "Hi"}]
    done = batch(
        tmp_path,
        [
            ask("text", prompt="Once", max_tokens=5),
            ask("chat", "/v1/chat/completions", model="apportion", messages=messages, max_tokens=5),
            ask("vector", "/v1/embeddings", input=["x", "y"]),
            b"\n",
            b"nonsense\n",
            b'{"custom_id": "bytes \xff"}\n',
            {"custom_id": "bare"},
            ask("stream", prompt="x", stream=True),
            ask("elsewhere", "/metrics"),
            ask("field", prompt="x", best_off=2),
            ask("model", prompt="x", model="gpt-17"),
        ],
    )
    _, log = done.communicate(timeout=120)
    assert done.returncode == 1 and "3 answered, 7 failed" in log
    told = answers(tmp_path)
    assert len(told) == 10
    by_id = {answer["custom_id"]: answer for answer in told}
    bodies = {name: by_id[name]["response"]["body"] for name in ("text", "chat", "vector", "field", "model")}
    assert bodies["text"]["usage"]["completion_tokens"] == 5 and bodies["text"]["choices"][0]["text"]
    assert bodies["chat"]["object"] == "chat.completion" and len(bodies["vector"]["data"]) == 2
    assert by_id["field"]["response"]["status_code"] == 400 and "best_off" in bodies["field"]["error"]["message"]
    assert by_id["model"]["response"]["status_code"] == 404
    errors = {name: by_id[name]["error"]["message"] for name in ("bare", "stream", "elsewhere")}
    assert "'body' is missing" in errors["bare"] and "line 8: body has stream" in errors["stream"] and "/v1/" in errors["elsewhere"]
    assert sorted(a["error"]["message"][:7] for a in told if a["custom_id"] is None) == ["line 5:", "line 6:"]


def test_a_death_of_the_engine_costs_no_line(tmp_path):
    running = batch(tmp_path, [ask(str(i), prompt=f"Story {i}", max_tokens=200, ignore_eos=True) for i in range(60)], "--max-num-seqs", "4")
    out = tmp_path / "out.jsonl"
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not (out.exists() and out.stat().st_size):
        time.sleep(0.05)
    [engine] = [p for p in psutil.Process(running.pid).children() if "apportion.serving.engine_process" in p.cmdline()]
    engine.kill()
    running.communicate(timeout=200)
    assert running.returncode == 0
    told = answers(tmp_path)
    assert sorted(int(a["custom_id"]) for a in told) == list(range(60))
    assert all(a["response"]["body"]["usage"]["completion_tokens"] == 200 for a in told)


def test_files_that_cannot_be_opened_are_one_sentence(tmp_path):
    gone = batch(tmp_path, [], "-i", str(tmp_path / "gone.jsonl"))
    _, log = gone.communicate(timeout=60)
    assert (
        gone.returncode == 2 and log == f"apportion: the batch file {tmp_path / 'gone.jsonl'} cannot be opened: No such file or directory\n"
    )
