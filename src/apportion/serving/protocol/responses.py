"""OpenAI's Responses: what a request may hold, and the conversation that its items are."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from apportion.core.errors import InvalidParameter
from apportion.core.sampling_params import SamplingParams
from apportion.serving.conversation import Conversation, join_system
from apportion.serving.protocol.openai import Int, TokenIds
from apportion.serving.protocol.shapes import (
    Effort,
    FlatJsonSchemaFormat,
    FunctionName,
    JsonObjectFormat,
    NamedFunction,
    Strict,
    StructuredOutputs,
    TextFormat,
    given_fields,
    shape_of,
)
from apportion.serving.tool_parsers.formats import FunctionTool

SAMPLING_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "stop",
    "stop_token_ids", "ignore_eos", "min_tokens",
)  # fmt: skip

Status = Literal["in_progress", "completed", "incomplete"]


class InputText(Strict):
    type: Literal["input_text", "text"]
    text: str


class OutputText(Strict):
    """annotations, logprobs: taken because answers carry them; they say nothing to a model."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class Refusal(Strict):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


Part = Annotated[InputText | OutputText | Refusal, Field(discriminator="type")]


class Message(Strict):
    """A turn, ours or theirs."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]
    id: str | None = None
    status: Status | None = None


class FunctionCallItem(Strict):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: FunctionName
    arguments: str
    id: str | None = None
    status: Status | None = None


class FunctionCallOutput(Strict):
    """What the function answered."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]
    id: str | None = None
    status: Status | None = None


class ReasoningText(Strict):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Strict):
    """What the model thought. Templates that forget earlier thoughts do so here too."""

    type: Literal["reasoning"]
    content: list[ReasoningText] | None = None
    summary: Annotated[list[Any], Field(max_length=0)] = []
    id: str | None = None
    status: Status | None = None


def _kind(item: Any) -> str:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return kind if isinstance(kind, str) else "message"


Item = Annotated[
    Annotated[Message, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


class TextConfig(Strict):
    format: Annotated[TextFormat | JsonObjectFormat | FlatJsonSchemaFormat, Field(discriminator="type")] | None = None


class Reasoning(Strict):
    """effort: "none" where the model's template can switch thoughts off; another where it has a variable for it."""

    effort: Effort | None = None
    summary: None = None


class FunctionToolItem(NamedFunction):
    type: Literal["function"]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedToolItem(NamedFunction):
    type: Literal["function"]


class ResponseStreamOptions(Strict):
    include_obfuscation: Literal[False] | None = None


class ResponseRequest(Strict):
    """POST /v1/responses."""

    model: Annotated[str | None, Field(description="name of a model of /v1/models; the first when absent")] = None
    input: Annotated[str | list[Item], Field(description="text, or messages, calls, their outputs and reasoning, in order")]
    instructions: Annotated[str | None, Field(description="a system message before the input; not carried to later responses")] = None
    previous_response_id: Annotated[str | None, Field(description="go on after this response, which the server must still hold")] = None
    store: Annotated[bool | None, Field(description="hold the response in memory, among the latest, for previous_response_id")] = True
    stream: Annotated[bool | None, Field(description="send OpenAI's events as text is generated")] = False
    stream_options: Annotated[ResponseStreamOptions | None, Field(description="with stream; include_obfuscation can only be false")] = None
    max_output_tokens: Annotated[Int | None, Field(ge=1, description="longest output in tokens, thoughts included")] = None
    temperature: Annotated[float | None, Field(description="0 is greedy")] = None
    top_p: Annotated[float | None, Field(description="nucleus sampling")] = None
    text: Annotated[TextConfig | None, Field(description="format: text, json_object or json_schema")] = None
    tools: Annotated[list[FunctionToolItem] | None, Field(description="functions that the model may call")] = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedToolItem | None, Field(description="auto, none, required, or the function to call")
    ] = None
    parallel_tool_calls: Annotated[bool | None, Field(description="false: one call at most")] = None
    reasoning: Annotated[Reasoning | None, Field(description="effort; no summary")] = None
    truncation: Annotated[Literal["disabled"] | None, Field(description="an input that is too long is an error")] = None
    background: Annotated[Literal[False] | None, Field(description="no response outlives its request")] = None
    include: Annotated[list[Any] | None, Field(max_length=0, description="nothing further can be included")] = None
    service_tier: Annotated[Literal["auto", "default"] | None, Field(description="there is one")] = None
    metadata: Annotated[dict[str, str] | None, Field(description="given back with the response")] = None
    user: Annotated[str | None, Field(description="written to the request's log line")] = None
    safety_identifier: Annotated[str | None, Field(description="written to the request's log line")] = None
    prompt_cache_key: Annotated[str | None, Field(description="a hint; every prefix is cached without one")] = None
    top_k: Annotated[Int | None, Field(description="sample among so many tokens; 0 or -1 for all")] = None
    min_p: Annotated[float | None, Field(description="least probability relative to the most likely token's")] = None
    presence_penalty: Annotated[float | None, Field(description="-2 to 2, over generated tokens")] = None
    frequency_penalty: Annotated[float | None, Field(description="-2 to 2, over generated tokens")] = None
    repetition_penalty: Annotated[float | None, Field(description="above 1 discourages tokens of prompt and output")] = None
    seed: Annotated[Int | None, Field(description="the same request with the same seed gives the same text")] = None
    stop: Annotated[str | list[str] | None, Field(description="end before any of these strings")] = None
    stop_token_ids: Annotated[TokenIds | None, Field(description="end at any of these tokens")] = None
    ignore_eos: Annotated[bool, Field(description="go on after the end-of-text token")] = False
    min_tokens: Annotated[Int, Field(description="do not stop before so many")] = 0
    structured_outputs: Annotated[StructuredOutputs | None, Field(description="one of json, regex, choice, grammar, json_object")] = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, Field(description="further variables of the template")] = None
    priority: Annotated[Int, Field(description="smaller runs earlier, with --scheduling-policy priority")] = 0
    cache_salt: Annotated[str | None, Field(description="prompts with another salt share no prefix cache")] = None

    def conversation(self, earlier: list[dict[str, Any]]) -> Conversation:
        """earlier: messages that went before. Errors: InvalidParameter where the tools and the choice do not fit."""
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        named = self.tool_choice.name if isinstance(self.tool_choice, NamedToolItem) else None
        return Conversation(
            messages=join_system([*system, *earlier, *self.messages()]),
            tools=[FunctionTool(t.name, t.description, t.parameters, bool(t.strict)) for t in self.tools or ()],
            tool_choice="named" if named else str(self.tool_choice or "auto"),
            named_tool=named,
            parallel_tool_calls=self.parallel_tool_calls is not False,
            variables=self.chat_template_kwargs or {},
            effort=self.reasoning.effort if self.reasoning else None,
        )

    def messages(self) -> list[dict[str, Any]]:
        """The input as OpenAI's chat API writes it. Errors: InvalidParameter for an empty one."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        if not self.input:
            raise InvalidParameter("input is an empty list; give at least one item")
        return to_messages(self.input)

    def sampling_params(self, defaults: dict[str, Any]) -> SamplingParams:
        """defaults: the model's own, for fields that the request leaves open. Errors: InvalidParameter."""
        given = given_fields(self, SAMPLING_FIELDS)
        format_ = self.text.format if self.text else None
        given["structured_outputs"] = shape_of(format_, self.structured_outputs, {}, field="text.format")
        max_tokens = defaults.get("max_tokens") if self.max_output_tokens is None else self.max_output_tokens
        return SamplingParams(**{**defaults, **given, "max_tokens": max_tokens})


def to_messages(items: list[Any]) -> list[dict[str, Any]]:
    """What an assistant thought, said and called between two turns of others is one message."""
    messages: list[dict[str, Any]] = []
    for item in items:
        match item:
            case Message(role="assistant"):
                _assistant(messages, before=("content", "tool_calls"))["content"] = _text(item.content, "")
            case Message():
                messages.append({"role": item.role.replace("developer", "system"), "content": _text(item.content, "\n")})
            case ReasoningItem():
                thought = "".join(part.text for part in item.content or ())
                _assistant(messages, before=("reasoning_content", "content", "tool_calls"))["reasoning_content"] = thought
            case FunctionCallItem():
                call = {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
                _assistant(messages, before=()).setdefault("tool_calls", []).append(call)
            case FunctionCallOutput():
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output, "\n")})
    for message in messages:
        message.setdefault("content", "")
    return messages


def _assistant(messages: list[dict[str, Any]], before: tuple[str, ...]) -> dict[str, Any]:
    """The assistant's message at the end; a new one unless what comes next stands before all that the last one has."""
    if not messages or messages[-1]["role"] != "assistant" or any(name in messages[-1] for name in before):
        messages.append({"role": "assistant"})
    return messages[-1]


def _text(content: str | list[Any], joint: str) -> str:
    return content if isinstance(content, str) else joint.join(part.text for part in content)
