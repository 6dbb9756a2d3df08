"""Chat templates: the bundled one, what templates on the hub expect, and refusals."""

from __future__ import annotations

import pytest

from apportion.core.errors import InvalidRequest
from apportion.processor.chat_template import ChatTemplate
from apportion.processor.tokenizer import Tokenizer

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>"}]


def test_bundled_template(bundled_model):
    template = Tokenizer.from_folder(bundled_model).chat_template
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b><|im_end|>\n"
    assert template.render(MESSAGES, add_generation_prompt=False) == expected
    assert template.render(MESSAGES) == expected + "<|im_start|>assistant\n"


def test_equal_to_transformers(bundled_model):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(bundled_model))
    ours = Tokenizer.from_folder(bundled_model)
    assert ours.chat_template.render(MESSAGES) == theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)


def test_what_templates_expect():
    source = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ tools | tojson }}{{ strftime_now('%Y') | length }}{{ mode }}"
    )
    messages = [{"role": "skip", "content": "no"}, {"role": "user", "content": [{"type": "text", "text": "yes"}]}]
    tools = [{"name": "f<é>"}]
    rendered = ChatTemplate(source, {"bos_token": "<s>"}).render(messages, tools=tools, mode="m")
    assert rendered == '<s>yes[{"name": "f<é>"}]4m'


@pytest.mark.parametrize(
    ("source", "messages", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", MESSAGES, "roles must alternate"),
        ("{% for %}", MESSAGES, "does not compile"),
        ("{{ messages[9].content.x }}", MESSAGES, "refused"),
        ("{{ ''.__class__.__mro__ }}", MESSAGES, "unsafe"),
        ("{{ messages.append(1) }}", MESSAGES, "unsafe|not safely"),
        ("x", [], "at least one message"),
        ("x", [{"content": "no role"}], "message 0 of the chat has no role"),
        ("x", [{"role": "user", "content": [{"type": "image_url"}]}], "text alone"),
    ],
)
def test_refusals(source, messages, said):
    with pytest.raises(InvalidRequest, match=said):
        ChatTemplate(source).render(messages)


def test_no_template_says_what_to_do(bundled_model):
    with pytest.raises(InvalidRequest, match="no chat template"):
        _ = Tokenizer.from_folder(bundled_model / "tokenizer.json").chat_template
