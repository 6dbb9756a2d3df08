"""What requests say about the shape of an answer: formats, grammars, tools. Shared by every API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from apportion.core.errors import InvalidParameter
from apportion.core.structured_outputs import StructuredOutputsParams
from apportion.serving.tool_parsers.formats import FunctionTool

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]  # of reasoning
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Strict(BaseModel):
    """Unknown fields and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class JsonSchemaBody(Strict):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=True)

    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class JsonSchema(JsonSchemaBody):
    """strict: always so here."""

    name: str
    description: str | None = None
    strict: bool | None = None


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Strict):
    """vLLM's: exactly one of these."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Function(Strict):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function

    @property
    def value(self) -> FunctionTool:
        function = self.function
        return FunctionTool(function.name, function.description, function.parameters, bool(function.strict))


class NamedFunction(Strict):
    name: FunctionName


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class FlatJsonSchemaFormat(JsonSchema):
    """As Responses have it."""

    type: Literal["json_schema"]


AnyFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat | FlatJsonSchemaFormat


def given_fields(request: BaseModel, names: Sequence[str]) -> dict[str, Any]:
    """Of `names`, what the request holds and is not null."""
    return {name: value for name in names if name in request.model_fields_set and (value := getattr(request, name)) is not None}


def shape_of(
    format_: AnyFormat | None,
    structured_outputs: StructuredOutputs | None,
    guided: Mapping[str, Any],
    *,
    field: str = "response_format",
) -> StructuredOutputsParams | None:
    """The one shape that a request asks for. guided: vLLM's older fields, by their new names. field: that of `format_`.

    Errors: InvalidParameter.
    """
    found: dict[str, StructuredOutputsParams] = {}
    match format_:
        case JsonObjectFormat():
            found[field] = StructuredOutputsParams(json_object=True)
        case JsonSchemaFormat():
            found[field] = StructuredOutputsParams(json=format_.json_schema.schema_)
        case FlatJsonSchemaFormat():
            found[field] = StructuredOutputsParams(json=format_.schema_)
    if structured_outputs is not None:
        found["structured_outputs"] = StructuredOutputsParams(**structured_outputs.model_dump(by_alias=True))
    for name, value in guided.items():
        if value is not None:
            found[f"guided_{name}"] = StructuredOutputsParams(**{name: value})
    if len(found) > 1:
        raise InvalidParameter(f"{' and '.join(found)} exclude each other; give one")
    return next(iter(found.values()), None)
