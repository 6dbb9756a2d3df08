"""The benchmark checkpoints: the sizes they promise, and that others load what we write."""

import json

import pytest
import torch

from apportion.bench import make_model as module
from apportion.bench.make_model import PRESETS, make_model, tensor_shapes
from apportion.bench.traffic import read_traffic
from apportion.core.errors import InvalidParameter

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SMALL_FFN = {
    "bench-250m": {"intermediate_size": 96},
    "bench-moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


@pytest.fixture(params=sorted(PRESETS))
def small(request, monkeypatch, tmp_path):
    """A preset at a size that a test can afford, written."""
    config = PRESETS[request.param] | SMALL | SMALL_FFN[request.param]
    monkeypatch.setitem(PRESETS, request.param, config)
    make_model(request.param, tmp_path, seed=3)
    return request.param, tmp_path


def test_sizes_are_those_of_the_readme():
    def count(preset):
        return sum(torch.Size(shape).numel() for _, shape in tensor_shapes(PRESETS[preset]))

    assert round(count("bench-250m") / 1e6) == 246
    embedding = module.VOCAB * PRESETS["bench-250m"]["hidden_size"]
    assert round(2 * (count("bench-250m") - embedding) / 1e6) == 426
    assert round(count("bench-moe") / 1e6) == 269


def test_transformers_loads_it_and_activations_stay_sane(small):
    transformers = pytest.importorskip("transformers")
    _, folder = small
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.inference_mode():
        output = model(torch.arange(3, 67)[None], output_hidden_states=True)
    assert 0.3 < output.logits.std() < 3
    assert all(0.3 < hidden.std() < 5 for hidden in output.hidden_states)


def test_same_seed_same_bytes_and_another_seed_others(small, tmp_path):
    preset, folder = small
    again, other = tmp_path / "again", tmp_path / "other"
    make_model(preset, again, seed=3)
    make_model(preset, other, seed=4)
    written = (folder / "model.safetensors").read_bytes()
    assert (again / "model.safetensors").read_bytes() == written != (other / "model.safetensors").read_bytes()
    assert not list(tmp_path.rglob("*.partial"))


def test_tokenizer_has_the_whole_vocabulary_and_keeps_any_text(small):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(small[1] / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == module.VOCAB
    text = "Two cores, naïve café 漢字 🙂\n\ttabs"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_traffic_of_a_step(small):
    preset, folder = small
    traffic = read_traffic(folder)
    config = json.loads((folder / "config.json").read_text())
    assert traffic.num_params == sum(torch.Size(shape).numel() for _, shape in tensor_shapes(config))
    assert traffic.kv_values == 2 * 2 * 2 * 16
    if preset == "bench-moe":
        assert traffic.expert_params == 2 * 4 * 3 * 32 * 64
        assert traffic.weight_params(1) == traffic.dense_params + traffic.expert_params / 2  # 2 of 4 experts
        assert traffic.weight_params(1) < traffic.weight_params(8) < traffic.dense_params + traffic.expert_params
    else:
        assert traffic.weight_params(1) == traffic.weight_params(16) == traffic.num_params - module.VOCAB * 64
    assert traffic.step_bytes(2, 10) - traffic.step_bytes(2, 0) == 2 * 10 * traffic.kv_values * 2 + 0


def test_unknown_preset_is_one_sentence(tmp_path):
    with pytest.raises(InvalidParameter, match=r"unknown preset 'x'; known: bench-250m, bench-moe"):
        make_model("x", tmp_path)
