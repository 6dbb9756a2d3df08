"""Anthropic's Messages: what a request may hold, and the conversation that its blocks are."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from apportion.core.errors import InvalidParameter, Unsupported
from apportion.core.sampling_params import SamplingParams
from apportion.core.structured_outputs import StructuredOutputsParams
from apportion.serving.conversation import Conversation, join_system
from apportion.serving.protocol.openai import Int
from apportion.serving.protocol.shapes import FunctionName, JsonSchemaBody, Strict, given_fields
from apportion.serving.tool_parsers.formats import FunctionTool

SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "ignore_eos")


class CacheControl(Strict):
    """A hint: every prefix is cached here without one, and kept as long as memory lasts."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Block(Strict):
    cache_control: CacheControl | None = None


class TextBlock(Block):
    """citations: can only be null."""

    type: Literal["text"]
    text: str
    citations: None = None


class ThinkingBlock(Strict):
    """What the model thought in an earlier turn; its signature is not looked at. Templates that forget earlier thoughts do so here too."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class ToolUseBlock(Block):
    type: Literal["tool_use"]
    id: str
    name: FunctionName
    input: dict[str, Any]


class ToolResultBlock(Block):
    """is_error: the result is given to the model as "Error: ..."."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] = ""
    is_error: bool = False


class MessageParam(Strict):
    """One turn. tool_use and thinking are of the assistant, tool_result of the user."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Annotated[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]]


class ToolParam(Block):
    """eager_input_streaming: inputs are always streamed."""

    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool = False
    type: Literal["custom"] | None = None
    eager_input_streaming: Literal[True] | None = None


class ToolChoiceParam(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Strict):
    """adaptive: as the model will. disabled: where its template has a switch. A budget cannot be kept here, so "enabled" is refused."""

    type: Literal["adaptive", "disabled"]


class JsonFormat(JsonSchemaBody):
    type: Literal["json_schema"]


class OutputConfig(Strict):
    format: JsonFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class Metadata(Strict):
    user_id: str | None = None


class CountTokensRequest(Strict):
    """POST /v1/messages/count_tokens."""

    model: Annotated[str | None, Field(description="name of a model of /v1/models; the first when absent")] = None
    messages: Annotated[
        list[MessageParam], Field(min_length=1, description="the conversation; an assistant's last message is gone on with")
    ]
    system: Annotated[str | list[TextBlock] | None, Field(description="what stands before the conversation")] = None
    tools: Annotated[list[ToolParam] | None, Field(description="functions that the model may call; no tools of the server's own")] = None
    tool_choice: Annotated[ToolChoiceParam | None, Field(description="auto, any, none, or tool with a name")] = None
    thinking: Annotated[Thinking | None, Field(description="adaptive or disabled; no budget")] = None
    output_config: Annotated[OutputConfig | None, Field(description="format: a JSON schema; effort where the template knows it")] = None
    cache_control: Annotated[CacheControl | None, Field(description="a hint; every prefix is cached without one")] = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, Field(description="further variables of the template")] = None

    @property
    def continues(self) -> bool:
        """Whether the model goes on with the last message. Errors: InvalidParameter where that has more than text."""
        last = self.messages[-1]
        if last.role != "assistant":
            return False
        content = [TextBlock(type="text", text=last.content)] if isinstance(last.content, str) else last.content
        text = "".join(block.text for block in content if isinstance(block, TextBlock))
        if not all(isinstance(block, TextBlock) for block in content) or not text or text != text.rstrip():
            raise InvalidParameter("messages ends with the assistant's: that must be text, without a blank at its end, to be gone on with")
        return True

    def conversation(self) -> Conversation:
        """Errors: InvalidParameter where the tools and the choice do not fit, Unsupported."""
        choice = self.tool_choice or ToolChoiceParam(type="auto")
        if (choice.type == "tool") != (choice.name is not None):
            raise InvalidParameter("tool_choice needs a name with the type 'tool', and with no other")
        system = [{"role": "system", "content": _text(self.system, "\n")}] if self.system else []
        return Conversation(
            messages=join_system([*system, *(message for turn in self.messages for message in to_messages(turn))]),
            tools=[FunctionTool(tool.name, tool.description, tool.input_schema, tool.strict) for tool in self.tools or ()],
            tool_choice={"any": "required", "tool": "named"}.get(choice.type, choice.type),
            named_tool=choice.name,
            parallel_tool_calls=not choice.disable_parallel_tool_use,
            variables=self.chat_template_kwargs or {},
            effort=self._effort(),
            checked_calls=True,  # an input is an object, not a text that should be one
        )

    def _effort(self) -> str | None:
        effort = self.output_config.effort if self.output_config else None
        if self.thinking is not None and self.thinking.type == "disabled":
            if effort is not None:
                raise Unsupported("output_config.effort says how much to think, and thinking is disabled; give one")
            return "none"
        return effort


class MessageRequest(CountTokensRequest):
    """POST /v1/messages."""

    max_tokens: Annotated[Int, Field(ge=1, description="longest output in tokens, thoughts included")]
    stream: Annotated[bool | None, Field(description="send Anthropic's events as text is generated")] = False
    stop_sequences: Annotated[list[str] | None, Field(description="end before any of these strings")] = None
    temperature: Annotated[float | None, Field(description="0 is greedy")] = None
    top_p: Annotated[float | None, Field(description="nucleus sampling")] = None
    top_k: Annotated[Int | None, Field(description="sample among so many tokens; 0 or -1 for all")] = None
    metadata: Annotated[Metadata | None, Field(description="user_id is written to the request's log line")] = None
    service_tier: Annotated[Literal["auto", "standard_only"] | None, Field(description="there is one")] = None
    min_p: Annotated[float | None, Field(description="least probability relative to the most likely token's")] = None
    repetition_penalty: Annotated[float | None, Field(description="above 1 discourages tokens of prompt and output")] = None
    seed: Annotated[Int | None, Field(description="the same request with the same seed gives the same text")] = None
    ignore_eos: Annotated[bool, Field(description="go on after the end-of-text token")] = False
    priority: Annotated[Int, Field(description="smaller runs earlier, with --scheduling-policy priority")] = 0
    cache_salt: Annotated[str | None, Field(description="prompts with another salt share no prefix cache")] = None

    def sampling_params(self, defaults: dict[str, Any]) -> SamplingParams:
        """defaults: the model's own, for fields that the request leaves open. Errors: InvalidParameter."""
        given = given_fields(self, SAMPLING_FIELDS)
        if self.stop_sequences:
            given["stop"] = self.stop_sequences
        if self.output_config is not None and self.output_config.format is not None:
            given["structured_outputs"] = StructuredOutputsParams(json=self.output_config.format.schema_)
        return SamplingParams(**{**defaults, **given, "max_tokens": self.max_tokens})


def to_messages(turn: MessageParam) -> list[dict[str, Any]]:
    """As OpenAI's chat API writes it: results are messages of their own, before the user's text. Errors: InvalidParameter."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    results: list[dict[str, Any]] = []
    message: dict[str, Any] = {"role": turn.role}
    texts: list[str] = []
    for block in turn.content:
        match block:
            case TextBlock():
                texts.append(block.text)
            case ThinkingBlock() if turn.role == "assistant":
                message["reasoning_content"] = message.get("reasoning_content", "") + block.thinking
            case ToolUseBlock() if turn.role == "assistant":
                function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
                message.setdefault("tool_calls", []).append({"id": block.id, "type": "function", "function": function})
            case ToolResultBlock() if turn.role == "user":
                text = _text(block.content, "\n")
                results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": f"Error: {text}" if block.is_error else text})
            case _:
                raise InvalidParameter(f"messages has a block of type {block.type!r} in a turn of the {turn.role}")
    if texts or not results:
        results.append({**message, "content": ("" if turn.role == "assistant" else "\n").join(texts)})
    return results


def _text(content: str | list[TextBlock], joint: str) -> str:
    return content if isinstance(content, str) else joint.join(block.text for block in content)
