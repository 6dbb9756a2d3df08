"""OpenAI's completions and chat completions: what a request may hold, in OpenAI's names, with vLLM's where OpenAI has none.

A field that is not here is refused by name. A value that would change nothing here is not quietly taken: see each field's type.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from apportion.core.errors import InvalidParameter, InvalidRequest
from apportion.core.sampling_params import SamplingParams
from apportion.serving.conversation import Conversation
from apportion.serving.protocol.shapes import (
    Effort,
    NamedTool,
    ResponseFormat,
    Strict,
    StructuredOutputs,
    Tool,
    ToolChoice,
    given_fields,
    shape_of,
)

Int = Annotated[int, Field(ge=-(2**63), lt=2**63)]
TokenIds = list[Int]

# fields that SamplingParams has under the same name
SAMPLING_FIELDS = (
    "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "stop",
    "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "allowed_token_ids", "bad_words", "truncate_prompt_tokens",
    "skip_special_tokens", "spaces_between_special_tokens", "prompt_logprobs",
)  # fmt: skip


class StreamOptions(Strict):
    """include_usage: a last chunk with the token counts. continuous_usage_stats: the counts so far in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(Strict):
    """The fields that both endpoints share."""

    model: Annotated[str | None, Field(description="name of a model of /v1/models; the first when absent")] = None
    stream: Annotated[bool | None, Field(description="send server-sent events as text is generated")] = False
    stream_options: Annotated[StreamOptions | None, Field(description="with stream")] = None
    n: Annotated[Int | None, Field(description="completions of each prompt")] = 1
    temperature: Annotated[float | None, Field(description="0 is greedy")] = None
    top_p: Annotated[float | None, Field(description="nucleus sampling")] = None
    top_k: Annotated[Int | None, Field(description="sample among so many tokens; 0 or -1 for all")] = None
    min_p: Annotated[float | None, Field(description="least probability relative to the most likely token's")] = None
    presence_penalty: Annotated[float | None, Field(description="-2 to 2, over generated tokens")] = None
    frequency_penalty: Annotated[float | None, Field(description="-2 to 2, over generated tokens")] = None
    repetition_penalty: Annotated[float | None, Field(description="above 1 discourages tokens of prompt and output")] = None
    seed: Annotated[Int | None, Field(description="the same request with the same seed gives the same text")] = None
    stop: Annotated[str | list[str] | None, Field(description="end before any of these strings")] = None
    stop_token_ids: Annotated[TokenIds | None, Field(description="end at any of these tokens")] = None
    include_stop_str_in_output: Annotated[bool, Field(description="keep what stopped it")] = False
    ignore_eos: Annotated[bool, Field(description="go on after the end-of-text token")] = False
    min_tokens: Annotated[Int, Field(description="do not stop before so many")] = 0
    max_tokens: Annotated[Int | None, Field(description="longest output in tokens")] = None
    logit_bias: Annotated[dict[str, float] | None, Field(description="token id to a number from -100 to 100")] = None
    allowed_token_ids: Annotated[TokenIds | None, Field(description="sample only these")] = None
    bad_words: Annotated[list[str] | None, Field(description="text that must not come")] = None
    truncate_prompt_tokens: Annotated[Int | None, Field(description="keep the last N tokens of the prompt; -1: as many as fit")] = None
    skip_special_tokens: Annotated[bool, Field(description="leave special tokens out of the text")] = True
    spaces_between_special_tokens: Annotated[bool, Field(description="with skip_special_tokens false")] = True
    prompt_logprobs: Annotated[Int | None, Field(description="top tokens at each position of the prompt")] = None
    priority: Annotated[Int, Field(description="smaller runs earlier, with --scheduling-policy priority")] = 0
    cache_salt: Annotated[str | None, Field(description="prompts with another salt share no prefix cache")] = None
    return_token_ids: Annotated[bool | None, Field(description="also give prompt_token_ids and token_ids")] = None
    user: Annotated[str | None, Field(description="written to the request's log line")] = None
    response_format: Annotated[ResponseFormat | None, Field(description="text, json_object or json_schema")] = None
    structured_outputs: Annotated[StructuredOutputs | None, Field(description="one of json, regex, choice, grammar, json_object")] = None
    guided_json: Annotated[dict[str, Any] | str | None, Field(description="older name of structured_outputs.json")] = None
    guided_regex: Annotated[str | None, Field(description="older name of structured_outputs.regex")] = None
    guided_choice: Annotated[list[str] | None, Field(description="older name of structured_outputs.choice")] = None
    guided_grammar: Annotated[str | None, Field(description="older name of structured_outputs.grammar")] = None

    default_max_tokens: ClassVar[int | None] = None

    def sampling_params(self, defaults: dict[str, Any], num_logprobs: int | None) -> SamplingParams:
        """defaults: the model's own, for fields that the request leaves open. Errors: InvalidParameter."""
        given = given_fields(self, SAMPLING_FIELDS)
        max_tokens = self.longest_output()
        if max_tokens is None:
            max_tokens = defaults.get("max_tokens", self.default_max_tokens)
        if self.logit_bias:
            given["logit_bias"] = {_token_id(key): bias for key, bias in self.logit_bias.items()}
        guided = {"json": self.guided_json, "regex": self.guided_regex, "choice": self.guided_choice, "grammar": self.guided_grammar}
        given["structured_outputs"] = shape_of(self.response_format, self.structured_outputs, guided)
        return SamplingParams(**{**defaults, **given, "max_tokens": max_tokens, "logprobs": num_logprobs})

    def longest_output(self) -> int | None:
        return self.max_tokens


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[str | list[str] | TokenIds | list[TokenIds], Field(description="text, token ids, or several of either")]
    echo: Annotated[bool | None, Field(description="begin with the prompt")] = False
    logprobs: Annotated[Int | None, Field(description="top tokens at each position, with those of an echoed prompt")] = None
    add_special_tokens: Annotated[bool, Field(description="let the tokenizer add what it adds, such as a beginning-of-text token")] = True

    default_max_tokens: ClassVar[int | None] = 16

    def prompts(self) -> list[str] | list[TokenIds]:
        """One entry a prompt. Errors: InvalidRequest for none."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise InvalidRequest("prompt is an empty list; give at least one")
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TextPart(Strict):
    type: Literal["text"]
    text: str


class FunctionCall(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Strict):
    """One turn. reasoning_content: what the model thought before it answered, for templates that take it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: no field that was not sent, and the name that templates know for developers."""
        message = self.model_dump(exclude_none=True)
        message.setdefault("content", "" if self.role != "assistant" else None)
        if self.role == "developer":
            message["role"] = "system"
        return message


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(description="the conversation", min_length=1)]
    max_completion_tokens: Annotated[Int | None, Field(description="longest output in tokens; max_tokens is its old name")] = None
    logprobs: Annotated[bool | None, Field(description="report the log-probability of each token")] = False
    top_logprobs: Annotated[Int | None, Field(description="with logprobs: the most likely tokens beside it")] = None
    echo: Annotated[bool, Field(description="begin with the last message, when the assistant wrote it")] = False
    add_generation_prompt: Annotated[bool, Field(description="let the template begin the assistant's turn")] = True
    continue_final_message: Annotated[bool, Field(description="go on writing the last message")] = False
    add_special_tokens: Annotated[bool, Field(description="let the tokenizer add what it adds; templates usually have")] = False
    chat_template: Annotated[str | None, Field(description="jinja2 text instead of the model's own template")] = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, Field(description="further variables of the template")] = None
    tools: Annotated[list[Tool] | None, Field(description="functions that the model may call")] = None
    tool_choice: Annotated[ToolChoice | None, Field(description="auto, none, required, or the function to call")] = None
    parallel_tool_calls: Annotated[bool | None, Field(description="false: one call at most")] = None
    reasoning_effort: Annotated[Effort | None, Field(description="none switches thoughts off; others where the template knows them")] = None

    def conversation(self) -> Conversation:
        """Errors: InvalidParameter where the tools and the choice do not fit."""
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        return Conversation(
            messages=[message.for_template() for message in self.messages],
            tools=[tool.value for tool in self.tools or ()],
            tool_choice="named" if named else str(self.tool_choice or "auto"),
            named_tool=named,
            parallel_tool_calls=self.parallel_tool_calls is not False,
            variables=self.chat_template_kwargs or {},
            template=self.chat_template,
            effort=self.reasoning_effort,
        )

    def longest_output(self) -> int | None:
        if self.max_tokens is not None and self.max_completion_tokens is not None and self.max_tokens != self.max_completion_tokens:
            raise InvalidParameter("max_tokens and max_completion_tokens differ; give one")
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def num_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidParameter("top_logprobs needs logprobs to be true")
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(Strict):
    """POST /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage] | None, Field(min_length=1)] = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool | None = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIds


class ModelRequest(Strict):
    """POST /v1/models/load and /v1/models/unload."""

    model: str


def _token_id(key: str) -> int:
    try:
        return int(key)
    except ValueError:
        raise InvalidParameter(f"logit_bias has the key {key!r}: keys are token ids") from None
