"""Grammars of strangers: what is wrong is said in one sentence, what explodes ends a process of its own, and the others notice nothing."""

import json
import os
import re
import signal
import time

import numpy as np
import pytest

from apportion.core.errors import InvalidParameter, InvalidRequest, Unsupported
from apportion.core.structured_outputs import StructuredOutputsParams
from apportion.processor.tokenizer import Tokenizer

pytest.importorskip("llguidance")

from apportion.serving.structured.compiler import GrammarCompiler
from apportion.serving.structured.limits import CompileLimits

VOCAB = 4096
REGEX_BOMB = "((a{1000}){1000}){1000}"
EIGHT_TIMES_EIGHT = [{"anyOf": [{"properties": {f"p{i}{j}": {"pattern": f"a{j}.*{i}"}}} for j in range(8)]} for i in range(8)]
PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name", "age"]}


@pytest.fixture(scope="module")
def tokenizer(bundled_model):
    return Tokenizer.from_folder(bundled_model)


@pytest.fixture(scope="module")
def compiler(tokenizer):
    compiler = GrammarCompiler()
    compiler.add_model("m", tokenizer, VOCAB, [0])
    yield compiler
    compiler.close()


def allowed(grammar):
    mask = np.frombuffer(grammar.mask(60.0), np.uint8)
    assert len(mask) * 8 >= VOCAB
    return set(np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist())


def follow(grammar, token_ids):
    for token in token_ids:
        assert token in allowed(grammar)
        grammar.accept(token)
    return grammar


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"json": PERSON}, '{"name": "Ada", "age": 36}'),
        ({"json": json.dumps(PERSON)}, '{\n  "name": "Ada",\n  "age": 36\n}'),
        ({"json_object": True}, '{"a": [1, null, {"b": "c"}]}'),
        ({"json": {}}, "[1, 2]"),
        ({"json": {"type": "array", "items": {"$ref": "#"}}}, "[[],[[]]]"),
        ({"regex": r"\d{3}-[a-f]+"}, "123-abc"),
        ({"choice": ["yes", 'no "really"', "näh"]}, 'no "really"'),
        ({"grammar": 'start: "a"+ "b"'}, "aab"),
        ({"grammar": 'root ::= "x" ("y" | "z")'}, "xz"),
    ],
    ids=str,
)
def test_a_text_of_the_grammar_is_followed_to_its_end(compiler, tokenizer, fields, text):
    grammar = compiler.compile("m", StructuredOutputsParams(**fields)).start()
    follow(grammar, tokenizer.encode(text, add_special_tokens=False))
    assert grammar.is_finished or 0 in allowed(grammar)
    if not grammar.is_finished:
        grammar.accept(0)
        assert grammar.is_finished


def test_states_are_their_own(compiler, tokenizer):
    compiled = compiler.compile("m", StructuredOutputsParams(regex="ab+|cd"))
    first, second = compiled.start(), compiled.start()
    follow(first, tokenizer.encode("a", add_special_tokens=False))
    assert allowed(first) != allowed(second) == allowed(compiled.start())


def test_what_does_not_fit_ends_the_grammar(compiler, tokenizer):
    grammar = compiler.compile("m", StructuredOutputsParams(regex="[0-9]+")).start()
    with pytest.raises(InvalidRequest, match="could not be followed"):
        grammar.accept(tokenizer.encode("x", add_special_tokens=False)[0])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"json": "{"}, "the JSON schema cannot be used: EOF while parsing"),
        ({"json": "5"}, "the JSON schema cannot be used: Expecting object"),
        ({"json": {"type": "strin"}}, "Invalid type: strin"),
        ({"json": {"type": "array", "uniqueItems": True}}, r'Unimplemented keys: \["uniqueItems"\]'),
        ({"json": {"$ref": "#"}}, "no text can satisfy it"),
        ({"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}}, "no text can satisfy it"),
        ({"json": {"$ref": "#/$defs/missing"}}, "missing"),
        ({"json": {"type": "object", "properties": {"a": False}, "required": ["a"]}}, "unsatisfiable"),
        ({"json": '{"type":"object","properties":{"a":' * 20_000 + "{}" + "}}" * 20_000}, "recursion limit"),
        (
            {"json": {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {"pattern": f"a{j}.*{i}"}}} for j in range(8)]} for i in range(8)]}},
            "too l",
        ),
        ({"regex": "("}, "the regular expression cannot be used: .* unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": REGEX_BOMB}, "too many expressions"),
        ({"grammar": "nothing of the kind"}, "the grammar cannot be used"),
        ({"grammar": "start: nowhere"}, "the grammar cannot be used: .*nowhere"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_said(compiler, fields, reason):
    with pytest.raises(InvalidParameter, match=reason) as raised:
        compiler.compile("m", StructuredOutputsParams(**fields))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


@pytest.mark.parametrize("limits", [CompileLimits(cpu_s=0.05), CompileLimits(num_bytes=40 << 20)], ids=str)
def test_a_bomb_ends_its_own_process_and_nobody_waits_for_it(tokenizer, limits):
    compiler = GrammarCompiler(limits)
    try:
        compiler.add_model("m", tokenizer, VOCAB, [0])
        compiler.compile("m", StructuredOutputsParams(choice=["warm", "up"]))
        bombs = [compiler.submit("m", StructuredOutputsParams(regex=REGEX_BOMB + "b" * i)) for i in range(3)]
        others = [compiler.submit("m", StructuredOutputsParams(choice=["a", str(i)])) for i in range(3)]
        for other in others:
            other.result(60)
        for bomb in bombs:
            with pytest.raises(InvalidParameter, match=re.escape(f"takes more than it may ({limits})")):
                bomb.result(60)
    finally:
        compiler.close()


def test_the_same_is_compiled_once_and_failures_are_tried_again(compiler):
    params = StructuredOutputsParams(choice=["kept", "once"])
    first = compiler.submit("m", params)
    assert compiler.submit("m", StructuredOutputsParams(choice=["kept", "once"])) is first
    broken = compiler.submit("m", StructuredOutputsParams(regex="("))
    assert broken.exception(60) is not None
    deadline = time.monotonic() + 60
    while compiler.submit("m", StructuredOutputsParams(regex="(")) is broken:  # callbacks run after waiters wake
        assert time.monotonic() < deadline


def test_the_sandbox_is_started_again(tokenizer):
    compiler = GrammarCompiler()
    try:
        compiler.add_model("m", tokenizer, VOCAB, [0])
        compiler.compile("m", StructuredOutputsParams(regex="a"))
        process = compiler._sandbox._process
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
        compiler.compile("m", StructuredOutputsParams(regex="b"))
    finally:
        compiler.close()
    assert compiler._sandbox._process is None


def test_a_model_whose_tokenizer_is_of_no_use(compiler, tmp_path):
    import tokenizers

    words = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")))
    compiler.add_model("words", words, 2, [])
    with pytest.raises(Unsupported, match="cannot be constrained"):
        compiler.compile("words", StructuredOutputsParams(regex="a"))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "exactly one of .* got none"),
        ({"regex": "a", "choice": ["b"]}, "got regex and choice"),
        ({"regex": ""}, "regex must be a non-empty string"),
        ({"choice": []}, "choice must be a non-empty list"),
        ({"choice": "yes"}, "choice must be a non-empty list"),
        ({"choice": ["a", 5]}, "choice must be a non-empty list"),
        ({"json": 5}, "json must be a JSON schema"),
        ({"json": {"a": {1}}}, "json cannot be written as JSON"),
        ({"json_object": "yes"}, "json_object must be True or False"),
        ({"grammar": "x" * (1 << 20) + "y"}, "at most 1048576"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_contradictions_are_refused(fields, reason):
    with pytest.raises(InvalidParameter, match=reason):
        StructuredOutputsParams(**fields)
