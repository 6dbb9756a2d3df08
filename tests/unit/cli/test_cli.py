"""The command line: output shapes, one-sentence errors, exit codes, and an end without orphans."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from apportion.cli.flags import add_engine_flags, engine_keywords, parse_bytes
from apportion.cli.main import VERBS, main
from apportion.llm import engine_config

SMALL = ["--kv-cache-memory", "32MiB", "--temperature", "0", "--max-tokens", "4"]


def run(capsys, *arguments):
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_generate_as_text(capsys):
    code, out, err = run(capsys, "generate", "The dog", *SMALL)
    assert code == 0 and out.startswith("The dog") and len(out) > len("The dog\n")
    assert err.startswith("memory: ") and err.count("\n") == 1


def test_generate_as_json_from_stdin(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("The dog\n\nA cat\n"))
    code, out, err = run(capsys, "generate", "--json", "-q", "--logprobs", "1", *SMALL)
    first, second = (json.loads(line) for line in out.splitlines())
    assert code == 0 and err == "" and [first["prompt"], second["prompt"]] == ["The dog", "A cat"]
    assert len(first["outputs"][0]["token_ids"]) == 4 == len(first["outputs"][0]["logprobs"])


def test_generate_from_a_file(capsys, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "One\\ntwo"}\n{"prompt": "x"}\n')
    code, out, _ = run(capsys, "generate", "-q", "--json", "--input", str(file), *SMALL)
    assert code == 0 and [json.loads(line)["prompt"] for line in out.splitlines()] == ["One\ntwo", "x"]


def test_chat_answers_and_converses(capsys, monkeypatch):
    code, out, _ = run(capsys, "chat", "-q", "Hello", *SMALL)
    assert code == 0 and out.strip()
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nAnd then?\n/reset\nHello\n/exit\nnever\n"))
    code, out, _ = run(capsys, "chat", "-q", "--json", *SMALL)
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(answers) == 3
    assert answers[1]["prompt"].count("<|im_start|>user") == 2 and answers[2]["prompt"] == answers[0]["prompt"]


def test_doctor(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    report = json.loads(out)
    assert code == 0 and report["kernels"]["chosen"] in report["kernels"]["known"] and report["kernels"]["because"]
    assert report["machine"]["cores"] >= 1 and isinstance(report["findings"], list)
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and report["kernels"]["chosen"] in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "--model", "/nowhere", "x"], "there is no folder '/nowhere'"),
        (["generate", ""], "the prompt is empty"),
        (["generate", "x", "--temperature", "-1"], "temperature must be at least 0, got -1.0"),
        (["generate", "x", "--min-tokens", "9", "--max-tokens", "2"], "min_tokens (9) is greater than max_tokens (2)"),
        (["generate", "x", "--max-model-len", "100000"], "max_model_len 100000 is more than the 2048 positions"),
        (["generate", "x", "--input", "y"], "not both"),
        (["generate", "--input", "/nowhere"], "the prompts cannot be read"),
        (["generate", "x", "--kernels", "none"], "unknown kernels 'none'"),
        (["generate", "x", "--logit-bias", "1:2", "1:3"], "--logit-bias names a token twice"),
        (["chat", "x", "--chat-template", "/nowhere"], "the chat template cannot be read"),
    ],
)
def test_errors_are_one_sentence_and_exit_code_2(capsys, arguments, said):
    code, out, err = run(capsys, *arguments)
    last = err.splitlines()[-1]
    assert code == 2 and out.strip() == "" and last.startswith("apportion: ") and said in last and "Traceback" not in err


@pytest.mark.parametrize("arguments", [[], ["frob"], ["generate", "--block-size", "33"], ["generate", "--kv-cache-memory", "much"]])
def test_unknown_verbs_and_flags(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "error" in capsys.readouterr().err


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and all(verb in out for verb in VERBS)


@pytest.mark.parametrize(("text", "num_bytes"), [("4GiB", 2**32), ("512M", 2**29), ("1e9", 10**9), ("1.5k", 1536), ("7b", 7)])
def test_sizes(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("extra", [[], ["--tensor-parallel-size", "2"]], ids=["one process", "two workers"])
def test_ctrl_c_ends_it_without_orphans(extra):
    if extra and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores for two workers")
    flags = ["--max-tokens", "2000", "--ignore-eos", "--kv-cache-memory", "32MiB", *extra]
    process = subprocess.Popen(
        [sys.executable, "-m", "apportion.cli.main", "generate", "The dog", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    started = process.stdout.read(len("The dog") + 10)  # it is generating
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert started.startswith(b"The dog") and process.returncode == 130 and b"Traceback" not in err, err.decode()
    assert len(children) >= (2 if extra else 0)
    deadline = time.monotonic() + 10
    while any(map(_lives, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [child for child in children if _lives(child)]


def _lives(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_number_formats_can_be_asked_for_on_the_line():
    parser = argparse.ArgumentParser()
    add_engine_flags(parser)
    config = engine_config(**engine_keywords(parser.parse_args(["--quantization", "fp8", "--kv-cache-dtype", "fp8"])))
    assert config.models[0].quantization == "fp8" and config.cache.kv_cache_dtype == "fp8"
    assert "quantization" not in engine_keywords(parser.parse_args([]))
