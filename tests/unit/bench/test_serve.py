"""`bench serve` against a server whose timing and faults are known: what it reports is what happened."""

import asyncio
import json
import math
import re

import pytest

from apportion.bench.arrivals import gamma_arrivals, trace_arrivals
from apportion.bench.http_stream import HttpClient
from apportion.bench.serve import Target, carries_token, offer_load, wait_ready
from apportion.bench.serving_metrics import Slo, count_errors, details, summarise
from apportion.bench.traces import TraceEntry, read_trace
from apportion.bench.workload import PromptMaker, Sample, file_samples, random_samples, trace_samples
from apportion.cli.main import main
from apportion.core.errors import BenchmarkFailed, InvalidParameter
from tests.unit.bench.fake_openai import FakeServer


def offer(server, samples, arrivals=None, *, target=None, **options):
    async def go():
        async with server.serving():
            client = HttpClient(server.url)
            model = await wait_ready(client, 5)
            run = await offer_load(client, target or Target(), model, samples, arrivals, **options)
            client.close()
            return run

    return asyncio.run(go())


def samples_of(num, output_len=5):
    return [Sample([3, 4, 5], 3, output_len) for _ in range(num)]


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_latencies_are_those_of_the_server(backend):
    server = FakeServer(first=0.2, gap=0.05)
    run = offer(server, samples_of(4), [0.0] * 4, target=Target(backend))
    result = summarise(run)
    assert result["completed"] == 4 and result["failed"] == 0
    assert 200 <= result["p50_ttft_ms"] < 290  # a chat's opening chunk, sent at once, is no token
    assert 50 <= result["p50_tpot_ms"] < 75 and 50 <= result["p50_itl_ms"] < 75
    assert 400 <= result["p50_e2el_ms"] < 550
    assert result["total_input_tokens"] == 28 and result["total_output_tokens"] == 20  # the server's count, not ours
    assert all(len(record.token_times) == 5 for record in run.records)
    assert server.bodies[0]["stream_options"] == {"include_usage": True} and server.bodies[0]["ignore_eos"] is True


def test_chunks_of_several_tokens_are_counted_by_usage():
    result = summarise(offer(FakeServer(gap=0.06, tokens_per_chunk=3), samples_of(2, output_len=9), [0, 0]))
    assert result["total_output_tokens"] == 18 and result["tokens_per_chunk"] == 3
    assert result["p50_itl_ms"] >= 60 and result["p50_tpot_ms"] == pytest.approx(result["p50_itl_ms"] * 2 / 8, rel=0.2)


def test_without_usage_chunks_are_counted():
    result = summarise(offer(FakeServer(usage=False), samples_of(2), [0, 0]))
    assert result["total_output_tokens"] == 10 and result["without_usage"] == 2


def test_failures_are_recorded_and_miss_the_objective():
    faults = {0: "500", 1: "cut", 2: "error", 3: "hang", 4: "junk"}
    server = FakeServer(first=0.01, gap=0.01, fault=faults.get)
    run = offer(server, samples_of(8), [0.02 * i for i in range(8)], request_timeout=1.0)
    errors = [record.error or "" for record in run.records]
    expected = ["status 500: the engine is down", "closed the connection", "out of blocks", "within 1 s", "no OpenAI event", "", "", ""]
    assert all(part in error for part, error in zip(expected, errors, strict=True)), errors
    result = summarise(run, slo=Slo.parse("ttft=5s"))
    assert (result["completed"], result["failed"], result["good"]) == (3, 5, 3)
    assert result["slo_attainment"] == 3 / 8
    assert len(details(run)["errors"]) == 8 and sum(result["timeline"]["failures"]) == 5


def test_latency_counts_from_the_intended_time():
    """One place, requests meant for one time: the third waits for two others, and a client that hides this would say 100 ms."""
    result = summarise(offer(FakeServer(first=0.1), samples_of(3, output_len=1), [0.0] * 3, max_concurrency=1))
    assert result["max_ttft_ms"] >= 300 and result["max_lag_ms"] >= 200 and result["max_concurrent_requests"] == 1


def test_a_closed_loop_keeps_its_places_filled():
    server = FakeServer(first=0.05)
    run = offer(server, samples_of(12), max_concurrency=4)
    result = summarise(run)
    assert server.peak == 4 == result["max_concurrent_requests"] and result["max_lag_ms"] < 50
    assert result["duration"] >= 3 * 0.05
    assert server.connections <= 5  # kept, not opened for every request


def test_slo_of_one_token_has_no_tpot():
    result = summarise(offer(FakeServer(), samples_of(2, output_len=1), [0, 0]), slo=Slo.parse("tpot:1"))
    assert result["good"] == 2 and result["p50_tpot_ms"] is None


def test_slo_is_read_as_written():
    assert Slo.parse("ttft=200,tpot=50ms e2el=1.5s").limits == {"ttft": 200, "tpot": 50, "e2el": 1500}
    for text in ("", "itl=5", "ttft", "ttft=fast", "ttft=1.2.3"):
        with pytest.raises(InvalidParameter):
            Slo.parse(text)


@pytest.mark.parametrize(
    ("choice", "carries"),
    [
        ({"text": "a", "finish_reason": None}, True),
        ({"text": "", "finish_reason": None}, True),  # within a character
        ({"text": "", "finish_reason": "stop"}, False),
        ({"text": "a", "finish_reason": "length"}, True),
        ({"delta": {"role": "assistant", "content": ""}, "finish_reason": None}, False),
        ({"delta": {"role": "assistant", "content": "a"}, "finish_reason": None}, True),
        ({"delta": {"reasoning_content": "hm"}, "finish_reason": None}, True),
        ({"delta": {"tool_calls": [{"index": 0}]}, "finish_reason": None}, True),
        ({"delta": {}, "finish_reason": "stop"}, False),
    ],
)
def test_which_chunks_carry_tokens(choice, carries):
    assert carries_token(choice) is carries


def test_a_server_that_never_comes_is_named():
    with pytest.raises(BenchmarkFailed, match=r"127\.0\.0\.1:9 is not ready after 0\.3 s"):
        asyncio.run(wait_ready(HttpClient("http://127.0.0.1:9"), 0.3))
    with pytest.raises(InvalidParameter, match="is no URL"):
        HttpClient("ftp://x")


# arrivals


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_arrivals_have_the_rate_and_the_burstiness(burstiness):
    times = gamma_arrivals(20_000, 50, burstiness, seed=1)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert times[-1] == pytest.approx(400) and times == sorted(times)
    assert deviation / mean == pytest.approx(burstiness**-0.5, rel=0.05)
    assert times == gamma_arrivals(20_000, 50, burstiness, seed=1) != gamma_arrivals(20_000, 50, burstiness, seed=2)


def test_arrivals_at_the_edges():
    assert gamma_arrivals(3, math.inf) == [0, 0, 0]
    assert gamma_arrivals(3, 2, math.inf) == [0.5, 1.0, 1.5]
    assert trace_arrivals([5.0, 6.0, 9.0], speedup=2) == [0, 0.5, 2]
    for call in (lambda: gamma_arrivals(1, 0), lambda: gamma_arrivals(1, 1, -1), lambda: trace_arrivals([0.0], speedup=0)):
        with pytest.raises(InvalidParameter):
            call()


# traces and prompts


def test_azure_trace(shared_data):
    entries = read_trace(shared_data("trace-azure-llm-2023/AzureLLMInferenceTrace_conv.csv"))
    assert len(entries) == 19_366
    assert (entries[0].time, entries[0].input_len, entries[0].output_len) == (0, 374, 44)
    assert entries[1].time == pytest.approx(4.314589, abs=1e-5) and 3400 < entries[-1].time < 3600


def test_mooncake_hashes_become_equal_tokens(shared_data):
    entries = read_trace(shared_data("trace-mooncake/conversation_trace.jsonl"), 300)
    found = trace_samples(PromptMaker(1000, seed=3), entries)
    assert [len(sample.prompt) for sample in found.samples] == [entry.input_len for entry in entries]
    pairs = 0
    for i in range(1, 300):
        for j in range(i):
            common = 0
            for a, b in zip(entries[i].hash_ids, entries[j].hash_ids, strict=False):
                if a != b:
                    break
                common += 1
            length = min(512 * common, entries[i].input_len, entries[j].input_len)
            assert found.samples[i].prompt[:length] == found.samples[j].prompt[:length]
            if length < min(entries[i].input_len, entries[j].input_len) - 8:
                assert found.samples[i].prompt[length : length + 8] != found.samples[j].prompt[length : length + 8]
            pairs += common > 1
    assert pairs > 10  # the trace has such pairs, so the test saw some


def test_scaled_traces_keep_their_shares():
    entries = [TraceEntry(0, 1536, 100, (1, 2, 3)), TraceEntry(1, 1300, 60, (1, 2, 9)), TraceEntry(2, 90_000, 10)]
    found = trace_samples(PromptMaker(500), entries, length_scale=0.25, max_len=2000)
    first, second = found.samples
    assert (len(first.prompt), first.output_len, len(second.prompt), second.output_len) == (384, 25, 325, 15)
    assert first.prompt[:256] == second.prompt[:256] and first.prompt[256:300] != second.prompt[256:300]
    assert found.num_too_long == 1 and found.times == [0, 1]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,1,2\nnever,1,2\n", "x.csv, line 3"),
        ("x.jsonl", '{"timestamp": 0, "input_length": 1}\n', "line 1: KeyError"),
        ("x.jsonl", "", "holds no request"),
        ("x.txt", "", "is no trace"),
    ],
)
def test_a_bad_trace_is_named(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidParameter, match=re.escape(said)):
        read_trace(tmp_path / name)


def test_other_traces_with_their_own_columns(tmp_path):
    (tmp_path / "azure2024.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.5+00:00,5,6\n2024-05-10 00:00:02+00:00,7,8\n"
    )
    (tmp_path / "burst.csv").write_text(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,GPT,9,4,13,x\n7,GPT,1,2,3,x\n"
    )
    assert [e.time for e in read_trace(tmp_path / "azure2024.csv")] == [0, 1.5]
    assert [(e.time, e.input_len, e.output_len) for e in read_trace(tmp_path / "burst.csv")] == [(0, 9, 4), (2, 1, 2)]


def test_random_samples_have_their_lengths_and_seed():
    make = PromptMaker(600, seed=5)
    samples = random_samples(make, 200, input_len=100, output_len=20, range_ratio=0.5, prefix_len=30)
    assert all(80 <= len(s.prompt) <= 180 and 10 <= s.output_len <= 30 and len(s.prompt) == s.prompt_len for s in samples)
    assert all(s.prompt[:30] == samples[0].prompt[:30] for s in samples)
    assert len({tuple(s.prompt[30:60]) for s in samples}) == 200
    assert all(3 <= token < 600 for s in samples for token in s.prompt)
    assert samples == random_samples(make, 200, input_len=100, output_len=20, range_ratio=0.5, prefix_len=30)
    assert len(PromptMaker(None).prompt("x", 12).split()) == 12


def test_prompts_of_a_file(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"q": "How many?", "output_tokens": 9}\n{"q": ["First turn", "second"]}\n')
    samples = file_samples(file, 3, prompt_field="q", output_len=4)
    assert [(s.prompt, s.output_len) for s in samples] == [("How many?", 9), ("First turn", 4), ("How many?", 9)]
    with pytest.raises(InvalidParameter, match="line 1: KeyError"):
        file_samples(file, 1)


# the verb


def bench(server, *arguments):
    """The verb in a thread, the server in this one's loop."""

    async def go():
        async with server.serving():
            return await asyncio.to_thread(main, ["bench", "serve", "--base-url", server.url, "-q", *arguments])

    return asyncio.run(go())


def test_the_verb_writes_its_results(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="plots need the extra [bench]")
    flags = ["--num-prompts", "20", "--request-rate", "100", "--burstiness", "0.5", "--output-len", "4", "--slo", "ttft=1s,tpot=200"]
    assert bench(FakeServer(first=0.01, gap=0.002), *flags, "-o", str(tmp_path / "run"), "--save-detailed") == 0
    out = capsys.readouterr().out
    assert "20 answered, 0 failed" in out and "100.0 % of those sent were good" in out and "TTFT" in out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["completed"] == 20 and len(result["ttfts"]) == 20 and result["p99_ttft_ms"] >= result["p50_ttft_ms"] > 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "result.json",
        "report.html",
        "latency.png",
        "timeline.png",
        "prompt_length.png",
    }
    page = (tmp_path / "run" / "report.html").read_text()
    assert not re.search(r"""(src|href|srcset)=["'](?!data:)""", page) and "@import" not in page and "url(" not in page


def test_reports_stand_side_by_side_and_escape_names(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="plots need the extra [bench]")
    for label in ("<b>ours</b>", "theirs"):
        flags = ["--num-prompts", "5", "--output-len", "3", "--label", label, "-o", str(tmp_path / label.strip("</b>"))]
        assert bench(FakeServer(first=0.01), *flags) == 0
    results = [str(path) for path in sorted(tmp_path.glob("*/result.json"))]
    assert len(results) == 2 and main(["bench", "report", *results, "-o", str(tmp_path / "both.html")]) == 0
    page = (tmp_path / "both.html").read_text()
    assert "&lt;b&gt;ours" in page and "<b>ours" not in page and "theirs" in page


def test_json_of_a_trace(capsys, tmp_path):
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"timestamp": 50 * i, "input_length": 600, "output_length": 3, "hash_ids": [0, i + 1]}) + "\n" for i in range(6))
    )
    server = FakeServer()
    assert (
        bench(
            server, "--dataset-name", "trace", "--dataset-path", str(tmp_path / "t.jsonl"), "--speedup", "5", "--json", "--num-warmups", "0"
        )
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["completed"] == 6 and result["request_rate"] == "trace" and result["duration"] >= 0.04
    assert len({tuple(body["prompt"][:512]) for body in server.bodies}) == 1 and len(server.bodies[0]["prompt"]) == 600


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num-prompts", "0"], "num_prompts must be at least 1"),
        (["--dataset-name", "trace"], "needs --dataset-path"),
        (["--dataset-name", "custom", "--dataset-path", "/nowhere"], "no file of prompts /nowhere"),
        (["--request-rate", "-1"], "request_rate must be above 0"),
        (["--slo", "speed=1"], "is no objective"),
        (["--metric-percentiles", "101"], "percentiles lie between"),
        (["--header", "x"], "is not NAME=VALUE"),
        (["--server-pid", "999999999"], "no process 999999999"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(capsys, flags, said):
    assert bench(FakeServer(), *flags) == 2
    assert said in capsys.readouterr().err


def test_every_request_failing_is_an_error(capsys):
    assert bench(FakeServer(fault=lambda number: "500"), "--num-prompts", "3", "--num-warmups", "0") == 2
    assert "no request succeeded: status 500: the engine is down" in capsys.readouterr().err
    assert bench(FakeServer(fault=lambda number: "500"), "--num-prompts", "3") == 2
    assert "warm-up requests failed" in capsys.readouterr().err


def test_errors_of_one_kind_are_counted_together():
    run = offer(FakeServer(fault=lambda number: "500"), samples_of(3), [0, 0, 0])
    run.records[1].error = "request 17 was lost"
    run.records[2].error = "request 18 was lost"
    assert count_errors(run.records) == {"request 17 was lost": 2, "status 500: the engine is down": 1}
