"""Files to documents, documents to windows: every token once, with the context that was promised."""

from __future__ import annotations

import lzma

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.core.errors import InvalidParameter
from apportion.evaluate.text import cut_windows, read_documents, read_jsonl


@given(st.lists(st.integers(0, 200), min_size=1, max_size=5), st.integers(2, 40), st.integers(1, 40))
def test_every_token_is_scored_once_with_context(lengths, window, stride):
    documents = [list(range(length)) for length in lengths]
    if sum(lengths) < window or stride > window:
        with pytest.raises(InvalidParameter):
            cut_windows(documents, window, stride)
        return
    windows = cut_windows(documents, window, stride)
    scored = [(w.document, token) for w in windows for token in w.token_ids[w.num_context :]]
    first = {(i, start) for i, length in enumerate(lengths) for start in (range(0, length, window) if stride == window else [0])}
    expected = {(i, token) for i, length in enumerate(lengths) for token in range(length)} - first
    assert len(scored) == len(set(scored)) and set(scored) == expected
    for w in windows:
        assert len(w.token_ids) <= window and w.num_scored > 0 and w.token_ids[0] == w.start
        assert w.num_context == 1 if w.start == 0 or stride == window else w.num_context >= window - stride


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(InvalidParameter, match="has 7 tokens, less than one window of 8"):
        cut_windows([[1, 2, 3], [4, 5, 6, 7]], 8)


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (8, 0), (8, 9)])
def test_windows_that_cannot_be(window, stride):
    with pytest.raises(InvalidParameter):
        cut_windows([list(range(50))], window, stride)


def test_documents_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    with lzma.open(tmp_path / "b.jsonl.xz", "wt") as file:
        file.write('{"text": "x\u2028x"}\n\n{"text": "y", "more": 1}\n')
    assert read_documents(tmp_path / "a.txt") == ["one\ntwo"] and read_documents(tmp_path / "b.jsonl.xz") == ["x\u2028x", "y"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": 1}\n', "entry 1 of .* has no 'text'"),
        (b'{"text": "a"}\n[1]\n', "line 2 of .* must be a JSON object"),
        (b"{\n", "line 1 of .* is no JSON"),
        (b"\n", "has no entries"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_bad_files_are_named(tmp_path, content, said):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(InvalidParameter, match=said):
        read_documents(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InvalidParameter, match=r"no\.jsonl cannot be read"):
        read_jsonl(tmp_path / "no.jsonl")
    (tmp_path / "torn.xz").write_bytes(b"\xfd7zXZ\x00torn")
    with pytest.raises(InvalidParameter, match=r"torn\.xz cannot be read"):
        read_documents(tmp_path / "torn.xz")
