"""What the API process does with texts and tools before the engine hears of them."""

from __future__ import annotations

import argparse
import asyncio
import threading

import pytest

from apportion.cli.serve import add_arguments, serve_config
from apportion.serving.messages import ModelInfo, ModelState
from apportion.serving.server import THREAD_TEXT_LEN, ServedModel

from .scripted import Script

TOOLS = [{"type": "function", "function": {"name": "f"}}]
CHAT = {"messages": [{"role": "user", "content": "Hello"}]}


class ThreadWatch:
    """A tokenizer that notes which thread it works on."""

    def __init__(self) -> None:
        self.threads: set[threading.Thread] = set()

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        self.threads.add(threading.current_thread())
        return [len(text), int(add_special_tokens)]


@pytest.mark.parametrize(
    ("prompts", "beside"), [(["short"], False), (["x" * THREAD_TEXT_LEN], True), (["many", "of", "them"], True), ([[7, 8], [9]], True)]
)
def test_only_one_short_text_is_tokenized_on_the_loop(prompts, beside):
    watch = ThreadWatch()
    model = ServedModel(ModelInfo("m", "m", ModelState.LOADED), watch)
    found = asyncio.run(model.encode_prompts(prompts, True))
    assert found == [([len(p), 1], p) if isinstance(p, str) else (p, None) for p in prompts]
    if isinstance(prompts[0], str):
        assert (watch.threads == {threading.main_thread()}) is not beside


def test_models_decide_to_call_only_where_they_may():
    with Script(enable_auto_tool_choice=False) as player:
        player.plays('<tool_call>{"name": "f", "arguments": {}}</tool_call>')
        refused = player.post("/v1/chat/completions", **CHAT, tools=TOOLS)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "tool_choice", refused.text
        assert player.post("/v1/messages", **CHAT, max_tokens=5, tools=[{"name": "f", "input_schema": {}}]).status_code == 400
        for choice, called in (("required", True), ("none", False)):
            answer = player.post("/v1/chat/completions", **CHAT, tools=TOOLS, tool_choice=choice)
            assert answer.status_code == 200 and bool(answer.json()["choices"][0]["message"].get("tool_calls")) is called
        assert player.post("/v1/chat/completions", **CHAT).status_code == 200


@pytest.mark.parametrize(("flags", "may"), [([], True), (["--enable-auto-tool-choice"], True), (["--no-enable-auto-tool-choice"], False)])
def test_the_flag_of_vllm_is_known(flags, may):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert serve_config(parser.parse_args(flags)).enable_auto_tool_choice is may
