"""A chat on its way to a model and back, whatever API it came by: prompt, tools, thoughts, and the shape its answer must have.

How a model writes calls and thoughts is read off its tokenizer and chat template, unless the server was told.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from apportion.core.errors import InvalidParameter, Unsupported
from apportion.core.sampling_params import SamplingParams
from apportion.core.structured_outputs import StructuredOutputsParams
from apportion.processor.tokenizer import Tokenizer
from apportion.serving.reasoning_parsers import think
from apportion.serving.tool_parsers.formats import FREE, FunctionTool, ToolFormat, lark_text
from apportion.serving.transforms import PlainText, TextTransform

# For templates that know nothing of tools: what Hermes models were told, which others understand as well.
TOOL_PROMPT = """You can call these functions. Each line is a function as JSON, with its parameters as JSON schema:
<tools>
{tools}
</tools>
To call one, answer with its name and arguments as JSON inside <tool_call></tool_call>:
<tool_call>
{{"name": "the function's name", "arguments": {{"a parameter": "its value"}}}}
</tool_call>"""


@dataclass(slots=True)
class Conversation:
    """messages: as OpenAI's chat API writes them. tool_choice: auto, none, required, or named with `named_tool`.

    variables: further ones of the template. effort: how much to think, "none" for not at all; None leaves it to the model.
    checked_calls: hold calls to JSON objects also where the model decides freely.
    Errors of every method: InvalidParameter, InvalidRequest, Unsupported.
    """

    messages: list[dict[str, Any]]
    tools: list[FunctionTool] = field(default_factory=list)
    tool_choice: str = "auto"
    named_tool: str | None = None
    parallel_tool_calls: bool = True
    variables: dict[str, Any] = field(default_factory=dict)
    template: str | None = None
    effort: str | None = None
    checked_calls: bool = False

    def __post_init__(self) -> None:
        names = [tool.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise InvalidParameter(f"tools has two functions named {next(n for n in names if names.count(n) > 1)!r}")
        if self.tool_choice in ("required", "named") and not names:
            raise InvalidParameter(f"tool_choice is {self.tool_choice} and there are no tools")
        if self.tool_choice == "named" and self.named_tool not in names:
            raise InvalidParameter(f"tool_choice names {self.named_tool!r}, which is not among the tools: {', '.join(names)}")
        if self.tool_choice == "none":
            self.tools = []
        if taken := {"messages", "tools", "add_generation_prompt"} & self.variables.keys():
            raise InvalidParameter(f"chat_template_kwargs cannot set {min(taken)!r}; it has a field of its own")

    @property
    def callable_tools(self) -> list[FunctionTool]:
        return [tool for tool in self.tools if self.tool_choice != "named" or tool.name == self.named_tool]


class ChatFormat:
    """How the model of `tokenizer` is talked to. tool_parser, reasoning_parser: "auto" or a name; reasoning also "none".

    auto_tools: whether the model may decide by itself to call one.
    """

    def __init__(self, tokenizer: Tokenizer, tool_parser: str = "auto", reasoning_parser: str = "auto", auto_tools: bool = True) -> None:
        self._tokenizer = tokenizer
        self._tool_parser, self._auto_tools = tool_parser, auto_tools
        self.thinks = _thinks(tokenizer) if reasoning_parser == "auto" else reasoning_parser != "none"

    def render(self, chat: Conversation, *, add_generation_prompt: bool = True, continues: bool = False) -> str:
        """The prompt. continues: it ends within the last message, for the model to go on writing it."""
        if chat.tools and chat.tool_choice == "auto" and not self._auto_tools:
            raise InvalidParameter("tool_choice is auto, which this server was told to refuse; say none, required or a function's name")
        template = self._tokenizer.chat_template if chat.template is None else self._tokenizer.compile_template(chat.template)
        messages = [_template_message(message) for message in chat.messages]
        begins_turn = add_generation_prompt and not continues
        variables = {**self._effort(chat), **chat.variables, "add_generation_prompt": begins_turn}
        if "tools" not in self._template_text(chat) and _speaks_of_tools(chat):
            messages = _in_words(messages, chat.tools)
        elif chat.tools:
            variables["tools"] = [tool.for_template() for tool in chat.tools]
        prompt = template.render(messages, **variables)
        return _cut_after(prompt, chat.messages[-1].get("content")) if continues else prompt

    def constrain(self, params: SamplingParams, chat: Conversation, prompt: str) -> SamplingParams:
        """`params` with what the tools and the model's thoughts ask of them."""
        shape = params.structured_outputs
        if chat.tools:
            calls = self._tool_shape(chat)
            if shape is not None and (calls is not None or chat.tool_choice == "auto"):
                raise InvalidParameter("a shape of the answer and tools exclude each other; set tool_choice to none")
            shape = calls or shape
        if shape is not None and self.thinks and not prompt.rstrip().endswith(think.CLOSE):
            shape = replace(shape, prefix=self._thought(prompt))
        params = replace(params, structured_outputs=shape)
        marks = {*((think.OPEN, think.CLOSE) if self.thinks else ()), *(self._tools(chat).marks if chat.tools else ())}
        if any(token.special and token.content in marks for token in self._tokenizer.backend.get_added_tokens_decoder().values()):
            params = replace(params, skip_special_tokens=False, spaces_between_special_tokens=False)  # parsers look for them
        return params

    def make_transform(self, chat: Conversation, prompt: str) -> TextTransform:
        """For one sequence."""
        answer = self._tools(chat).make_parser(chat.tools) if chat.tools else PlainText()
        if not self.thinks or prompt.rstrip().endswith(think.CLOSE):
            return answer
        return think.ThinkParser(answer, is_open=prompt.rstrip().endswith(think.OPEN))

    def _tool_shape(self, chat: Conversation) -> StructuredOutputsParams | None:
        """None where the model is free, and trusted to write calls as they should be."""
        tools, parallel = chat.callable_tools, chat.parallel_tool_calls
        if chat.tool_choice in ("required", "named"):
            return StructuredOutputsParams(grammar=self._tools(chat).required(tools, parallel=parallel and chat.tool_choice != "named"))
        if parallel and not chat.checked_calls and not any(tool.strict for tool in tools):
            return None
        return StructuredOutputsParams(grammar=self._tools(chat).allowed(tools, parallel=parallel))

    def _thought(self, prompt: str) -> str:
        tokens = {text: token for token, text in self._tokenizer.added_tokens.items()}
        rest = f"{FREE} {lark_text(think.CLOSE, tokens)}" if think.CLOSE in tokens else "till_close"
        till_close = f"till_close[lazy]: /(?s:.*){think.CLOSE.replace('/', chr(92) + '/')}/\n" if think.CLOSE not in tokens else ""
        thought = f"thought: {rest} /\\s{{0,4}}/\n{till_close}"
        if prompt.rstrip().endswith(think.OPEN):
            return f"prefix: thought\n{thought}"
        return f"prefix: ({lark_text(think.OPEN, tokens)} thought)?\n{thought}"

    def _effort(self, chat: Conversation) -> dict[str, Any]:
        """Variables that tell the template how much to think. Errors: Unsupported where it cannot be told."""
        if chat.effort is None:
            return {}
        text = self._template_text(chat)
        if "reasoning_effort" in text and (chat.effort != "none" or "enable_thinking" not in text):
            return {"reasoning_effort": chat.effort}
        if chat.effort != "none":
            raise Unsupported(
                f"a reasoning effort of {chat.effort!r} cannot be asked of a model whose chat template has no variable for it"
            )
        if switch := next((name for name in ("enable_thinking", "thinking") if name in text), None):
            return {switch: False}
        if self.thinks:
            raise Unsupported("the model always thinks: its chat template has no switch for it")
        return {}

    def num_thought_tokens(self, token_ids: Sequence[int], thought: str) -> int:
        """How many of an answer's tokens are thought, marks included. thought: its text, for a tokenizer without a mark of its own."""
        if not thought:
            return 0
        close = self._tokenizer.backend.token_to_id(think.CLOSE)
        if close is None:
            return min(len(token_ids), len(self._tokenizer.encode(thought, add_special_tokens=False)))
        return token_ids.index(close) + 1 if close in token_ids else len(token_ids)

    def _tools(self, chat: Conversation) -> ToolFormat:
        if self._tool_parser != "auto":
            return ToolFormat(self._tool_parser, self._tokenizer)
        return ToolFormat.of(self._tokenizer, self._template_text(chat))

    def _template_text(self, chat: Conversation) -> str:
        return chat.template or self._tokenizer.chat_template_text or ""


def join_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the system messages at the beginning as one: most templates take no second."""
    num = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    system = [{"role": "system", "content": "\n\n".join(message["content"] for message in messages[:num])}] if num else []
    return [*system, *messages[num:]]


def _thinks(tokenizer: Tokenizer) -> bool:
    return think.CLOSE in (tokenizer.chat_template_text or "") or think.CLOSE in tokenizer.added_tokens.values()


def _speaks_of_tools(chat: Conversation) -> bool:
    return bool(chat.tools) or any(message.get("tool_calls") or message["role"] == "tool" for message in chat.messages)


def _template_message(message: dict[str, Any]) -> dict[str, Any]:
    """Templates expect arguments as an object, where the API has them as text."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {**message, "tool_calls": [{**call, "function": {**call["function"], "arguments": _arguments(call)}} for call in calls]}


def _arguments(call: dict[str, Any]) -> Any:
    text = call["function"]["arguments"]
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidParameter(f"messages has a tool call whose arguments are not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise InvalidParameter(f"messages has a tool call whose arguments are no JSON object: {text[:80]}")
    return arguments


def _cut_after(prompt: str, content: Any) -> str:
    """The prompt up to the end of the last message's text, without what the template closes a turn with."""
    text = content.strip() if isinstance(content, str) else ""
    at = prompt.rfind(text)
    if not text or at < 0:
        raise InvalidParameter("messages must end with text that the chat template shows, for the model to go on with it")
    return prompt[: at + len(text)]


def _in_words(messages: Sequence[dict[str, Any]], tools: Sequence[FunctionTool]) -> list[dict[str, Any]]:
    """Tools, calls and their results as plain text, for a template that knows none of them."""
    told: list[dict[str, Any]] = []
    for message in messages:
        content = message.get("content") or ""
        if not isinstance(content, str):
            content = "\n".join(part.get("text", "") for part in content)
        if message["role"] == "tool":
            told.append({"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"})
        elif message.get("tool_calls"):
            calls = [json.dumps({"name": c["function"]["name"], "arguments": c["function"]["arguments"]}) for c in message["tool_calls"]]
            told.append(
                {"role": "assistant", "content": "\n".join(filter(None, [content, *(f"<tool_call>\n{c}\n</tool_call>" for c in calls)]))}
            )
        else:
            told.append({**message, "content": content})
    if tools:
        prompt = TOOL_PROMPT.format(tools="\n".join(json.dumps(tool.for_template(), ensure_ascii=False) for tool in tools))
        first = told[0] if told and told[0]["role"] == "system" else None
        system = {"role": "system", "content": prompt if first is None else f"{first['content']}\n\n{prompt}"}
        told = [system, *(told if first is None else told[1:])]
    return told
