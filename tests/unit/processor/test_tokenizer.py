"""Tokenizers of checkpoint folders: special-token rules, conversion, errors."""

from __future__ import annotations

import json
import shutil

import pytest

from apportion.core.errors import CheckpointError
from apportion.processor.tokenizer import Tokenizer

TEXT = "Hello, wörld! 日本語 😀\n\tdef f(x): return x"


def test_bundled_tokenizer_round_trips(bundled_model):
    tokenizer = Tokenizer.from_folder(bundled_model)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.vocab_size == 4096
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 0)
    assert tokenizer.decode([0, *tokenizer.encode("a")]) == "a"
    assert tokenizer.decode([0, *tokenizer.encode("a")], skip_special_tokens=False) == "<|endoftext|>a"


@pytest.mark.parametrize(("add_bos", "add_eos"), [(True, False), (True, True), (False, True), (False, False)])
def test_explicit_switches_overrule_tokenizer_json(bundled_model, tmp_path, add_bos, add_eos):
    shutil.copy(bundled_model / "tokenizer.json", tmp_path)
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "add_bos_token": add_bos, "add_eos_token": add_eos}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(tmp_path)
    plain = tokenizer.encode("Hello", add_special_tokens=False)
    assert tokenizer.encode("Hello") == [tokenizer.bos_token_id] * add_bos + plain + [tokenizer.eos_token_id] * add_eos


def test_bad_words_are_found_after_a_space_and_at_the_start(bundled_model):
    tokenizer = Tokenizer.from_folder(bundled_model)
    sequences = tokenizer.bad_words_token_ids(["the"])
    assert [tokenizer.decode(ids) for ids in sequences] == ["the", " the"]


def test_gpt2_files_are_converted(shared_data, tmp_path):
    pytest.importorskip("transformers")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(shared_data("tok-gpt2") / name, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_sentencepiece_model_is_converted(shared_data, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("sentencepiece")
    shutil.copy(shared_data("tok-mistral/tokenizer.model.v1"), tmp_path / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = tokenizer.encode("Hello world")
    assert ids == [1, 22557, 1526]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (None, "", "no tokenizer in"),
        ("tokenizer.json", "{broken", "is not a tokenizer that"),
        ("tokenizer.json", '{"version": "1.0"}', "is not a tokenizer that"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", "{", "is not readable JSON"),
    ],
)
def test_broken_folders_are_named(tmp_path, file, content, message):
    if file:
        (tmp_path / file).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_folder(tmp_path)
