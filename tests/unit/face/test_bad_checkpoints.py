"""A checkpoint that cannot be used is refused in one sentence that names the thing; so is a machine too small for it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from apportion import LLM, ApportionError, SamplingParams
from apportion.core.errors import CheckpointError, InvalidRequest, OutOfMemory, Unsupported


@pytest.fixture
def folder(bundled_model, tmp_path):
    return shutil.copytree(bundled_model, tmp_path / "model")


def edit_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder, kind, said, **engine):
    with pytest.raises(kind, match=said) as caught:
        LLM(folder, **{"kv_cache_memory": 2**25} | engine)
    assert isinstance(caught.value, ApportionError) and "\n" not in str(caught.value)


def test_unknown_architecture(folder):
    edit_config(folder, architectures=["MambaForCausalLM"])
    refused(folder, Unsupported, "unknown architecture 'MambaForCausalLM'; known: .*LlamaForCausalLM")


def test_missing_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.3.mlp.up_proj.weight"))
    refused(folder, CheckpointError, "lacks model.layers.3.mlp.up_proj.weight")


def test_extra_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.extra": torch.zeros(3)}))
    refused(folder, CheckpointError, "does not use: model.layers.0.extra")


def test_misshapen_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(255)}))
    refused(folder, CheckpointError, r"model.norm.weight must have shape \[256\], .* it has \[255\]")


def test_truncated_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(folder, CheckpointError, "model.safetensors is truncated: tensor .* ends at byte")


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": "b"},
        {"a": {"dtype": "BF16", "shape": 5, "data_offsets": [0, 4]}},
        {"a": {"dtype": "BF16", "shape": [6], "data_offsets": [-8, 4]}},
    ],
)
def test_junk_in_a_header(folder, header):
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    refused(folder, CheckpointError, "model.safetensors has no valid safetensors header")


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ([], "must hold a 'weight_map' of tensor names to file names"),
        ({"a": 5}, "must hold a 'weight_map' of tensor names to file names"),
        ({"a": "x.safetensors"}, "names 1 files; missing: x.safetensors"),
        ({"a": "model.safetensors"}, "places tensor a in model.safetensors, which does not hold it"),
    ],
)
def test_junk_in_an_index(folder, places, said):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    refused(folder, CheckpointError, said)


def test_a_tokenizer_that_knows_more_tokens_than_the_model(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 4096, "content": "<new>"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with LLM(folder, kv_cache_memory=2**25) as llm:
        with pytest.raises(InvalidRequest, match="prompt token 1 is 4096, outside the vocabulary of 4096 tokens"):
            llm.generate("a<new>")
        [output] = llm.generate("a", SamplingParams(bad_words=["<new>"], max_tokens=2))
        assert output.outputs[0].error is None, "what cannot come needs no ban"


def test_missing_files(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, CheckpointError, "has no model.safetensors")
    (folder / "config.json").unlink()
    refused(folder, CheckpointError, "has no config.json")
    refused("/nonexistent/model", CheckpointError, "there is no folder '/nonexistent/model'")


def test_broken_config(folder):
    (folder / "config.json").write_text("{")
    refused(folder, CheckpointError, "config.json cannot be read")


def test_not_enough_memory(folder):
    edit_config(folder, intermediate_size=2**30)
    refused(folder, OutOfMemory, r"weights of [\d.]+ GiB and .* do not fit: [\d.]+ GiB are free", kv_cache_memory=None)


def test_a_length_that_does_not_fit(folder):
    refused(folder, OutOfMemory, "max_model_len 2048 of .* the largest that fits is [0-9]+", kv_cache_memory=2**21, max_model_len=2048)


def test_logits_that_are_no_numbers_fail_one_request_alone(folder):
    """A NaN in the embedding of one token reaches only the requests that hold it."""

    def poison(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.embed_tokens.weight"][4000] = float("nan")

    edit_tensors(folder, poison)
    edit_config(folder, tie_word_embeddings=False)
    with LLM(folder, kv_cache_memory=2**25) as llm:
        params = SamplingParams(temperature=0, max_tokens=5)
        bad, good = llm.generate([[5, 4000, 6], [5, 7, 6]], params)
        assert bad.finished and bad.outputs[0].finish_reason == "error" and "NaN or infinite logits" in bad.outputs[0].error
        assert good.outputs[0].finish_reason == "length" and good.outputs[0].error is None
        assert llm.generate([[5, 7, 6]], params)[0].outputs[0].token_ids == good.outputs[0].token_ids
