"""`apportion eval` as a user calls it: tables, JSON, files, and one sentence for what cannot be."""

from __future__ import annotations

import json
import shutil

import pytest

from apportion.assets import PASSAGE
from apportion.cli.eval import parse_keywords
from apportion.cli.main import main
from apportion.core.errors import InvalidParameter
from apportion.evaluate.report import Report

ENGINE = ["--kv-cache-memory", "64MiB"]
PNG = b"\x89PNG\r\n"


def run(capsys, *arguments):
    code = main(["eval", *map(str, arguments), *ENGINE])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(PASSAGE.read_text()[:1500])
    return path


def test_perplexity_as_a_table(capsys, text):
    code, out, err = run(capsys, "ppl", "--text", text, "--window", "64")
    assert code == 0 and "perplexity" in out and "95% interval" in out and "window 64, stride 64" in out and err.startswith("memory: ")


def test_perplexity_as_json_and_files(capsys, text, bundled_model, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ["ppl", bundled_model, "--text", text, "--window", "64", "--stride", "32", "--json", "-q", "-o", tmp_path / "out"]
    code, out, err = run(capsys, *arguments)
    content = json.loads(out)
    assert code == 0 and err == "" and content["settings"]["stride"] == 32 and content["command"].startswith("apportion eval ppl ")
    report = Report.read(tmp_path / "out" / "report.json")
    assert report.as_dict() == content and report.metrics["nll"].low < report.metrics["nll"].value
    assert (tmp_path / "out" / "nll_by_position.png").read_bytes().startswith(PNG)


def test_compare_with_a_precision(capsys, text, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ["compare", "--text", text, "--window", "128", "--candidate", "dtype=bfloat16", "--json", "-q", "-o", tmp_path]
    code, out, _ = run(capsys, *arguments)
    content = json.loads(out)
    assert code == 0 and content["loss"] == "nll_difference" and 0 < content["metrics"]["kl"]["value"] < 1e-3
    assert content["floor"] == content["metrics"]  # the candidate is the A/A run
    assert (content["subject"]["engine"]["dtype"], content["reference"]["engine"]["dtype"]) == ("bfloat16", "float32")
    assert (tmp_path / "kl_quantiles.png").read_bytes().startswith(PNG)


def test_compare_with_another_model(capsys, text, bundled_model, mixture_model):
    arguments = ["compare", bundled_model, "--text", text, "--window", "128", "--candidate", f"model={mixture_model}", "--no-floor"]
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and "top1_agreement" in out and "A/A" not in out


def test_retrieval_with_a_heat_map(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    grid = ["--tasks", "passkey", "mqar", "--lengths", "128", "--depths", "0", "1", "--num-samples", "2"]
    code, out, _ = run(capsys, "retrieval", *grid, "--json", "-q", "-o", tmp_path)
    content = json.loads(out)
    assert code == 0 and content["metrics"]["retrieval"]["num"] == 8 and len(content["cells"]) == 4
    assert (tmp_path / "retrieval.png").read_bytes().startswith(PNG)
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 8


def test_generate_judged_in_full_precision(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ["generate", "--text", PASSAGE, "--num-prompts", "3", "--prompt-len", "16", "--max-tokens", "24", "-o", tmp_path]
    code, out, err = run(capsys, *arguments)
    assert code == 0 and "kl_on_path" in out and "looping" in out and "judged_nll.png" in err
    report = Report.read(tmp_path / "report.json")
    assert report.reference["engine"]["dtype"] == "float32" and report.subject["engine"]["dtype"] != "float32"


def test_questions_of_a_file(capsys, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "Who?", "answer": "I"}\n{"question": "Why?", "answer": ["so", "thus"]}\n')
    code, out, _ = run(capsys, "qa", "--questions", questions, "--json", "-q", "--max-answer-tokens", "4", "--num-shots", "1")
    assert code == 0 and json.loads(out)["metrics"]["exact_match"]["num"] == 1
    code, out, _ = run(capsys, "qa", "--questions", questions, "--chat", "--max-answer-tokens", "4")
    assert code == 0 and "exact_match" in out


def test_recovery_of_a_precision(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    grid = ["--tasks", "passkey", "--lengths", "128", "--depths", "0.5", "--num-samples", "2"]
    code, out, _ = run(capsys, "recovery", *grid, "--candidate", "dtype=bfloat16", "-o", tmp_path)
    report = Report.read(tmp_path / "report.json")
    assert code == 0 and report.loss == "score_lost" and report.settings["num_items"] == 2 and "score_original" in out
    assert (tmp_path / "recovery.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ppl", "--text", "TEXT", "--window", "1000"], "tokens, less than one window of 1000: give a longer text"),
        (["ppl", "--text", "TEXT", "--window", "9999"], "a window of 9999 tokens does not fit"),
        (["ppl", "--text", "/nowhere.txt"], "/nowhere.txt cannot be read"),
        (["ppl", "NO_TOKENIZER", "--text", "TEXT"], "no tokenizer"),
        (["ppl", "/nowhere", "--text", "TEXT"], "there is no folder '/nowhere'"),
        (["qa", "--questions", "/nowhere.jsonl"], "/nowhere.jsonl cannot be read"),
        (["retrieval", "--tasks", "riddle"], "unknown retrieval task 'riddle'"),
        (["retrieval", "--filler", "/nowhere.txt"], "/nowhere.txt cannot be read"),
        (["generate", "--text", "TEXT", "--max-tokens", "9999"], "do not fit"),
        (["recovery", "--lengths", "128"], "recovery needs --candidate KEY=VALUE"),
        (["compare", "--text", "TEXT"], "compare needs --candidate KEY=VALUE"),
        (["compare", "--text", "TEXT", "--candidate", "bf16"], "'bf16' is not KEY=VALUE"),
        (["compare", "--text", "TEXT", "--candidate", "dtipe=bfloat16"], "unknown parameter 'dtipe'; did you mean 'dtype'?"),
    ],
)
def test_errors_are_one_sentence_and_exit_code_2(capsys, arguments, said, text, tmp_path, bundled_model):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(bundled_model / name, folder)
    code, out, err = run(capsys, *({"TEXT": text, "NO_TOKENIZER": folder}.get(a, a) for a in arguments))
    last = err.splitlines()[-1]
    assert code == 2 and out.strip() == "" and last.startswith("apportion: ") and said in last and "Traceback" not in err


def test_keywords():
    assert parse_keywords(["dtype=bfloat16", "max-num-seqs=8", "kv_cache_memory=1MiB", "enable_prefix_caching=false"]) == {
        "dtype": "bfloat16", "max_num_seqs": 8, "kv_cache_memory": 2**20, "enable_prefix_caching": False,
    }  # fmt: skip
    with pytest.raises(InvalidParameter, match="dtype is given twice"):
        parse_keywords(["dtype=float32", "dtype=bfloat16"])
