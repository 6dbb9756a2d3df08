"""Incremental text equals the text decoded at once, whole characters only; stop strings across token borders."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.assets import DEFAULT_MODEL
from apportion.core.sampling_params import SamplingParams
from apportion.processor.detokenizer import Detokenizer
from apportion.processor.tokenizer import Tokenizer

BUNDLED = Tokenizer.from_folder(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def mistral(shared_data, tmp_path_factory):
    pytest.importorskip("transformers")
    pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("mistral")
    shutil.copy(shared_data("tok-mistral/tokenizer.model.v1"), folder / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_folder(folder)


def stream(tokenizer, ids, prompt=(), **params):
    """Pieces shown token by token, and the stop string found."""
    detokenizer = Detokenizer(tokenizer, prompt, SamplingParams(**params))
    pieces, stop = [], None
    for token_id in ids:
        stop = detokenizer.append([token_id])
        pieces.append(detokenizer.take(finished=False))
        if stop is not None:
            break
    pieces.append(detokenizer.take(finished=True))
    assert "".join(pieces) == detokenizer.text
    return pieces, stop


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, BUNDLED.vocab_size - 1), max_size=40), st.booleans())
def test_pieces_of_random_tokens_make_the_whole(ids, skip):
    pieces, _ = stream(BUNDLED, ids, skip_special_tokens=skip)
    assert "".join(pieces).rstrip("\ufffd") == BUNDLED.decode(ids, skip_special_tokens=skip).rstrip("\ufffd")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_pieces_of_a_text_are_whole_characters(text):
    pieces, _ = stream(BUNDLED, BUNDLED.encode(text, add_special_tokens=False), skip_special_tokens=False)
    assert "".join(pieces).rstrip("\ufffd") == text.rstrip("\ufffd")
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_is_never_shown():
    ids = BUNDLED.encode("a😀")
    assert len(ids) > 3
    for cut in range(2, len(ids)):
        assert "".join(stream(BUNDLED, ids[:cut])[0]) == "a"


@pytest.mark.parametrize("tail", ["", "fine", "é"])
def test_bytes_that_begin_no_character_are_shown_as_they_come(tail):
    """All but the last three, which might begin one, while they come; all of them once something follows."""
    byte = BUNDLED.backend.token_to_id("ÿ")  # 0xFF as byte-level vocabularies spell it
    ids = [byte] * 40 + BUNDLED.encode(tail, add_special_tokens=False)
    pieces, _ = stream(BUNDLED, ids)
    assert "".join(pieces) == BUNDLED.decode(ids) if tail else "\ufffd" * 37
    assert "".join(pieces[:40]) == "\ufffd" * 37


@pytest.mark.parametrize("text", ["Hello world", " leading", "日本語 😀 ok", "a\nb", "é" * 7])
def test_byte_fallback_text_with_and_without_a_prompt(mistral, text):
    ids = mistral.encode(text, add_special_tokens=False)
    assert "".join(stream(mistral, ids)[0]) == mistral.decode(ids)
    prompt = mistral.encode("Once upon", add_special_tokens=False)
    whole = mistral.decode(prompt + ids)
    assert "".join(stream(mistral, ids, prompt=prompt)[0]) == whole[len("Once upon") :]


def test_byte_fallback_survives_bytes_that_are_no_character(mistral):
    byte = {value: mistral.backend.token_to_id(f"<0x{value:02X}>") for value in (0xE2, 0x82, 0xAC, 0x80)}
    ids = [byte[0xE2], byte[0x82], byte[0xAC], byte[0x80], *mistral.encode("fine", add_special_tokens=False)]
    assert "".join(stream(mistral, ids)[0]).endswith("fine")


def test_ids_beyond_the_tokenizer_read_as_nothing():
    assert "".join(stream(BUNDLED, [*BUNDLED.encode("ab"), 99_999, *BUNDLED.encode("c")])[0]) == "abc"


@settings(max_examples=200, deadline=None)
@given(st.text("abc ", min_size=1, max_size=40), st.lists(st.text("abc ", min_size=1, max_size=4), min_size=1, max_size=3), st.booleans())
def test_stop_strings_cut_where_plain_search_would(text, stops, include):
    ids = BUNDLED.encode(text, add_special_tokens=False)
    pieces, found = stream(BUNDLED, ids, stop=stops, include_stop_str_in_output=include)
    if found is None:
        assert all(stop not in text for stop in stops) and "".join(pieces) == text
    else:
        at = text.find(found)
        assert "".join(pieces) == text[: at + len(found) if include else at]
        assert found in stops


def test_a_possible_start_of_a_stop_string_is_kept_back():
    detokenizer = Detokenizer(BUNDLED, [], SamplingParams(stop=["STOP"]))
    shown = ""
    for token_id in BUNDLED.encode("one ST two STO", add_special_tokens=False):
        detokenizer.append([token_id])
        shown += detokenizer.take(finished=False)
    assert shown == "one ST two "
    assert detokenizer.take(finished=True) == "STO"


def test_no_stop_string_begins_before_min_tokens():
    ids = BUNDLED.encode("x. y. z. w.", add_special_tokens=False)
    pieces, found = stream(BUNDLED, ids, stop=["."], min_tokens=4, max_tokens=100)
    assert found == "." and "".join(pieces).startswith("x. y")


def test_the_token_that_ends_a_sequence_is_no_text():
    detokenizer = Detokenizer(BUNDLED, [], SamplingParams())
    ids = BUNDLED.encode("ab!", add_special_tokens=False)
    detokenizer.append(ids, skip_last=True)
    assert detokenizer.text == BUNDLED.decode(ids[:-1])


def test_special_tokens_side_by_side():
    ids = [0, 0]
    assert "".join(stream(BUNDLED, ids)[0]) == ""
    shown = stream(BUNDLED, ids, skip_special_tokens=False, spaces_between_special_tokens=False)[0]
    assert "".join(shown) == "<|endoftext|><|endoftext|>"
