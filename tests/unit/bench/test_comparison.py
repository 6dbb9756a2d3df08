"""The arithmetic behind the README's table: ratios by round, floors, merged results; and the GGUF that llama.cpp is given."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


compare_peers = load(ROOT / "benchmarks" / "compare_peers.py")
run_all = load(ROOT / "benchmarks" / "run_all.py")


def test_ratio_is_the_median_of_the_rounds_against_the_best_median():
    case = compare_peers.CASES["decode-8"]
    rates = {"apportion": [30.0, 20.0, 40.0], "slow": [1.0, 2.0, 100.0], "fast": [10.0, 10.0, 10.0]}
    medians = {engine: sorted(values)[1] for engine, values in rates.items()}
    found = compare_peers.bar(case, "best", 2.1, rates, medians)
    assert found["against"] == "fast" and found["ratio"] == 3.0 and found["rounds"] == [3.0, 2.0, 4.0] and found["met"]
    assert compare_peers.bar(case, "absent", 2.0, rates, medians)["met"] is None


def test_rates_count_decode_steps_or_prompt_tokens():
    decode, prefill = compare_peers.CASES["decode-8"], compare_peers.CASES["prefill-512"]
    answer = {"prefill_s": 2.0, "decode_s": 4.0, "token_ids": [[0] * 128] * 8}
    assert decode.tokens_per_s(answer) == 8 * 127 / 4.0
    assert prefill.tokens_per_s(answer) == 512 / 2.0


def test_prompts_of_the_peers_are_ours():
    protocol = load(ROOT / "benchmarks" / "peers" / "protocol.py")
    from apportion.bench.latency import random_prompts

    assert protocol.random_prompts(2, 9, seed=4) == random_prompts(2, 9, protocol.VOCAB, seed=4)


def test_cases_measured_again_replace_only_themselves():
    results = {"peers": {"cases": {"a": 1, "b": 2}}}
    run_all.merge(results, "peers", {"cases": {"b": 3}, "threads": 2})
    assert results["peers"] == {"cases": {"a": 1, "b": 3}, "threads": 2}


def test_readme_table_stands_between_its_markers(tmp_path, monkeypatch):
    monkeypatch.setattr(run_all, "ROOT", tmp_path)
    assert not run_all.write_readme("x")
    (tmp_path / "README.md").write_text(f"before\n{run_all.BEGIN}\nold\n{run_all.END}\nafter\n")
    assert run_all.write_readme("| new |")
    assert (tmp_path / "README.md").read_text() == f"before\n{run_all.BEGIN}\n| new |\n{run_all.END}\nafter\n"


def test_a_table_row_names_dtype_bytes_and_verdict():
    figures = {"tokens_per_s": 50.4, "dtype": "bf16", "bytes_per_token": 429e6}
    bars = [{"against": "vllm", "to_reach": 1.4, "ratio": 1.5, "met": True}]
    case = {"engines": {"apportion": figures, "vllm": figures | {"tokens_per_s": 33.0}}, "bars": bars, "floor_tokens_per_s": 63.0}
    row = run_all.peers_table({"cases": {"decode-1": case}})[-1]
    assert row == "| decode 1 | 50 bf16 (429) | 33 bf16 (429) | 63 | 1.50x vLLM CPU | 1.4x | met |"


@pytest.mark.parametrize("preset", ["bench-250m", "bench-moe"])
def test_gguf_holds_the_model(preset, tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    from apportion.bench.make_model import PRESETS, make_model

    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    monkeypatch.setitem(PRESETS, preset, PRESETS[preset] | small | {"intermediate_size": 96, "moe_intermediate_size": 32})
    make_model(preset, tmp_path)
    convert = load(ROOT / "benchmarks" / "peers" / "gguf_convert.py")
    convert.convert(tmp_path, tmp_path / "model.gguf", "bf16")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    source = convert.read_bf16(tmp_path / "model.safetensors")
    assert (tensors["blk.1.attn_v.weight"].data.view("uint16") == source["model.layers.1.self_attn.v_proj.weight"]).all()
    query = source["model.layers.0.self_attn.q_proj.weight"]
    if preset == "bench-moe":
        stacked = tensors["blk.0.ffn_up_exps.weight"].data.view("uint16").reshape(32, 32, 64)
        assert (stacked[5] == source["model.layers.0.mlp.experts.5.up_proj.weight"]).all()
    else:  # rows 0 and 8 of a head of 16 channels, a rotated pair, become neighbours
        query = query[[0, 8, 1, 9]]
    assert (tensors["blk.0.attn_q.weight"].data.view("uint16")[: len(query)] == query).all()
    assert sum(tensor.n_elements for tensor in tensors.values()) == sum(words.size for words in source.values())
