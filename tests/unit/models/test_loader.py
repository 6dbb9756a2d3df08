"""Loading: layouts of files, dtypes, memory, and a sentence for everything that can be wrong with a checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from apportion.core.config import ModelConfig
from apportion.core.errors import CheckpointError
from apportion.kernels.reference.ops import ReferenceOps
from apportion.models.checkpoint import SafetensorsFile, read_spec, resolve_folder
from apportion.models.loader import load_model, weight_layers

TOKENS = [1, 5, 99, 0, 42, 7]


def test_one_file_and_shards_are_equal(tiny, tmp_path, load, logits_of):
    whole = logits_of(load(tiny.write()).model, TOKENS)
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(logits_of(load(tiny.write(shards=3)).model, TOKENS), whole)


def test_every_number_matters(tiny, load, logits_of):
    """A changed tensor changes the logits: nothing is used twice, dropped or left at zero."""
    base = logits_of(load(tiny.write()).model, TOKENS)
    for name in [n for n in tiny.tensors if ".layers.1." in n or ".layers." not in n]:
        if name.endswith("k_proj.bias"):
            continue  # adds the same to all scores of a query (but for rotation)
        kept = tiny.tensors[name]
        tiny.tensors[name] = kept + 0.05 * torch.randn(kept.shape, generator=torch.Generator().manual_seed(1))
        assert not torch.allclose(logits_of(load(tiny.write()).model, TOKENS), base, atol=1e-4), name
        tiny.tensors[name] = kept


def test_dtypes_of_file_and_memory(tiny, load, logits_of):
    tiny.tensors = {name: tensor.bfloat16() for name, tensor in tiny.tensors.items()}
    tiny.config["dtype"] = "bfloat16"
    stored = load(tiny.write())
    widened = load(tiny.folder, dtype="float32")
    assert (stored.manifest["dtype"], widened.manifest["dtype"]) == ("bfloat16", "float32")
    assert stored.manifest["nbytes"] < 0.6 * widened.manifest["nbytes"]
    # norms and biases are float32 in both; matrices hold the same numbers
    assert torch.equal(logits_of(stored.model, TOKENS), logits_of(widened.model, TOKENS))


def test_tied_embeddings(tiny, load, logits_of):
    tiny.tensors["lm_head.weight"] = tiny.tensors["model.embed_tokens.weight"].clone()
    untied = logits_of(load(tiny.write()).model, TOKENS)
    tiny.config["tie_word_embeddings"] = True
    both = load(tiny.write())  # a copy of the embeddings in the file is harmless
    del tiny.tensors["lm_head.weight"]
    one = load(tiny.write())
    assert both.manifest["nbytes"] == one.manifest["nbytes"]
    assert torch.equal(logits_of(both.model, TOKENS), untied) and torch.equal(logits_of(one.model, TOKENS), untied)


def test_harmless_extras(tiny, load):
    tiny.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    load(tiny.write())


def test_progress_counts_every_byte(tiny):
    folder, seen = tiny.write(), []
    load_model(ModelConfig(model=str(folder)), read_spec(folder), ReferenceOps(), progress=lambda done, total: seen.append((done, total)))
    total = sum(t.numel() * 4 for t in tiny.tensors.values())
    assert seen[0] == (0, total) and seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_dummy_weights(tiny, logits_of, load):
    (tiny.folder / "config.json").write_text(json.dumps(tiny.config))
    loaded, again, other = (load(tiny.folder, load_format="dummy", seed=seed) for seed in (0, 0, 1))
    logits = logits_of(loaded.model, TOKENS)
    assert torch.isfinite(logits).all() and logits.std() > 0
    assert torch.equal(logits, logits_of(again.model, TOKENS)) and not torch.equal(logits, logits_of(other.model, TOKENS))
    assert all(name.startswith(("model.", "lm_head")) for name in (layer.name for layer in weight_layers(loaded.model)))


def test_layout_is_aligned_and_disjoint(tiny, load):
    manifest = json.loads(json.dumps(load(tiny.write()).manifest))
    end = 0
    for entry in manifest["entries"]:
        assert entry["offset"] % 256 == 0 and entry["offset"] >= end
        end = entry["offset"] + entry["nbytes"]
    assert end <= manifest["nbytes"] < end + 256


def break_missing(tiny):
    del tiny.tensors["model.layers.1.mlp.up_proj.weight"]
    tiny.write()


def break_extra(tiny):
    tiny.tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 3)
    tiny.write()


def break_shape(tiny):
    tiny.tensors["model.norm.weight"] = torch.zeros(49)
    tiny.write()


def break_dtype(tiny):
    tiny.tensors["model.norm.weight"] = torch.zeros(48, dtype=torch.int8)
    tiny.write()


def break_truncated(tiny):
    path = tiny.write() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def break_header(tiny):
    path = tiny.write() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def break_empty(tiny):
    (tiny.write() / "model.safetensors").write_bytes(b"")


def break_not_safetensors(tiny):
    (tiny.write() / "model.safetensors").write_bytes((16).to_bytes(8, "little") + b"not json at all!")


def break_no_weights(tiny):
    (tiny.write() / "model.safetensors").unlink()


def break_shard_file(tiny):
    (tiny.write(shards=2) / "model-00002-of-00002.safetensors").unlink()


def break_index(tiny):
    path = tiny.write(shards=2) / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"lm_head.weight"', '"lm_head.wight"'))


def break_config(tiny):
    (tiny.write() / "config.json").write_text("{")


def break_no_config(tiny):
    (tiny.write() / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (break_missing, r"lacks model.layers.1.mlp.up_proj.weight"),
        (break_extra, r"tensors that LlamaForCausalLM does not use: model.layers.2.mlp.up_proj.weight"),
        (break_shape, r"model.norm.weight must have shape \[48\], .* it has \[49\]"),
        (break_dtype, r"model.norm.weight of .* is I8; weights must be F64, F32, F16, BF16"),
        (break_truncated, r"is truncated: tensor \S+ ends at byte \d+, the file has \d+"),
        (break_header, r"is truncated: its header ends at byte \d+, the file has 100"),
        (break_empty, r"cannot be read: .*empty"),
        (break_not_safetensors, r"no valid safetensors header"),
        (break_no_weights, r"has no model.safetensors"),
        (break_shard_file, r"names 2 files; missing: model-00002-of-00002.safetensors"),
        (break_index, r"places tensor lm_head.wight in model-0000\d-of-00002.safetensors, which does not hold it"),
        (break_config, r"config.json cannot be read"),
        (break_no_config, r"has no config.json"),
    ],
)
def test_damaged_checkpoints(tiny, load, damage, said):
    damage(tiny)
    with pytest.raises(CheckpointError, match=said):
        load(tiny.folder)


def test_many_missing_are_counted(tiny, load):
    tiny.config["num_hidden_layers"] = 4
    with pytest.raises(CheckpointError, match=r"lacks model.layers.2.input_layernorm.weight, .* and 27 more"):
        load(tiny.write())


def test_generation_config_adds_stop_tokens(tiny):
    tiny.config["eos_token_id"] = 2
    folder = tiny.write()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 2]}))
    assert read_spec(folder).eos_token_ids == (2, 3)


def test_no_such_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="no folder 'nobody/nothing-0', and the hub does not give"):
        resolve_folder("nobody/nothing-0")
    with pytest.raises(CheckpointError, match="not the form of a hub id"):
        resolve_folder(str(tmp_path / "absent"))
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_folder(str(tmp_path / "file"))


def test_unaligned_tensors_are_read(tmp_path):
    """The format lets a tensor start anywhere."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}) + " " * 1
    header += " " * ((2 - len(header)) % 4)
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + torch.tensor([1.5, -2.0]).numpy().tobytes())
    file = SafetensorsFile(path)
    assert file.tensors[0].start % 4 == 2
    assert file.read(file.tensors[0]).tolist() == [1.5, -2.0]


PEAK = """
import json, sys, torch
from apportion.core.config import ModelConfig
from apportion.kernels.reference.ops import ReferenceOps
from apportion.models.checkpoint import read_spec
from apportion.models.loader import load_model
from pathlib import Path

def resident():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}

folder = sys.argv[1]
spec = read_spec(Path(folder))
torch.ones(8, 8) @ torch.ones(8, 8)
before = resident()["VmRSS"]
loaded = load_model(ModelConfig(model=folder), spec, ReferenceOps())
print(json.dumps({"growth": resident()["VmHWM"] - before, "packed": loaded.manifest["nbytes"]}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_peaks_at_packed_size(tiny, make_shapes):
    """Mapped file pages count as resident until they are given back: loading must not hold the file beside the weights."""
    tiny.config |= {"hidden_size": 768, "intermediate_size": 2048, "vocab_size": 4000, "num_attention_heads": 12, "num_key_value_heads": 4}
    tiny.config |= {"num_hidden_layers": 4, "attention_bias": False, "mlp_bias": False}
    tiny.tensors = {name: torch.ones(shape) for name, shape in make_shapes(tiny.config).items() if not name.endswith(".bias")}
    largest = max(t.numel() * 4 for t in tiny.tensors.values())
    folder = tiny.write()
    run = subprocess.run([sys.executable, "-c", PEAK, str(folder)], capture_output=True, text=True, check=True)
    measured = json.loads(run.stdout)
    assert measured["packed"] > 100e6
    assert measured["growth"] < measured["packed"] + 2 * largest + 10e6, measured


def test_a_module_can_be_replaced(tiny, load, logits_of):
    """Calibration swaps parts of the tree; the model must then use the new part."""
    loaded = load(tiny.write())
    before = logits_of(loaded.model, TOKENS)
    other = load(tiny.folder, load_format="dummy")
    loaded.model.layers[0].mlp = other.model.layers[0].mlp
    assert not torch.equal(logits_of(loaded.model, TOKENS), before)


def test_large_tensors_are_packed_in_pieces(tiny, load, logits_of, monkeypatch):
    whole = logits_of(load(tiny.write()).model, TOKENS)
    monkeypatch.setattr("apportion.layers.weights.CHUNK_BYTES", 1)
    loaded = load(tiny.folder)
    pieces = [source for layer in weight_layers(loaded.model) for source in layer.sources(()) if source.name == "lm_head.weight"]
    assert [source.index[0] for source in pieces] == [slice(0, 32), slice(32, 64), slice(64, 96), slice(96, 101)]
    assert torch.equal(logits_of(loaded.model, TOKENS), whole)
