"""Write the tables of docs/serving.md: which fields each endpoint takes, as the protocols declare them.

python scripts/fields.py          write them between the page's markers
python scripts/fields.py --check  exit with status 1 if they are not up to date
"""

from __future__ import annotations

import json
import sys
from typing import Any

from pages import ROOT, with_part, write_or_check

from apportion.serving.protocol.anthropic import CountTokensRequest, MessageRequest
from apportion.serving.protocol.embeddings import EmbeddingRequest
from apportion.serving.protocol.openai import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, ModelRequest, TokenizeRequest
from apportion.serving.protocol.responses import ResponseRequest
from apportion.serving.protocol.shapes import Strict

PAGE = ROOT / "docs" / "serving.md"
SCRIPT = "scripts/fields.py"
ENDPOINTS: dict[str, type[Strict]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/responses": ResponseRequest,
    "/v1/messages": MessageRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/v1/models/load, /v1/models/unload": ModelRequest,
}


def kind(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words. Null is not told: it is what an absent field is."""
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    if "const" in schema or "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema.get("enum", [schema.get("const")]))
    for word in ("anyOf", "oneOf"):
        if word in schema:
            found = [kind(branch) for branch in schema[word] if branch.get("type") != "null"]
            return " or ".join(dict.fromkeys(found)) or "null"
    if schema.get("type") == "array":
        return "empty list" if schema.get("maxItems") == 0 else f"list of {kind(schema.get('items', {}))}"
    if isinstance(values := schema.get("additionalProperties"), dict):
        return f"object of {kind(values)}"
    return str(schema.get("type", "anything"))


def rows(schema: dict[str, Any], *, described: bool) -> str:
    text = ""
    for name, field in schema["properties"].items():
        default = "required" if name in schema.get("required", ()) else json.dumps(field.get("default")).replace("null", "")
        last = f" {field.get('description', '')} |" if described else ""
        text += f"| `{name}` | {kind(field)} | {default} |{last}\n"
    return text


def tables() -> str:
    text, objects = "", {}
    for path, model in ENDPOINTS.items():
        schema = model.model_json_schema(by_alias=True)
        described = any("description" in field for field in schema["properties"].values())
        head = "| field | type | default | |\n|---|---|---|---|" if described else "| field | type | default |\n|---|---|---|"
        text += f"### Fields of {path}\n\n{head}\n{rows(schema, described=described)}\n"
        for name, definition in schema.get("$defs", {}).items():
            if objects.setdefault(name, definition) != definition:
                raise SystemExit(f"two objects are named {name}: rename one")
    text += "### Objects in these fields\n\n| object | fields | |\n|---|---|---|\n"
    for name, definition in sorted(objects.items()):
        required = definition.get("required", ())
        fields = ", ".join(f"`{f}`{'' if f in required else '?'}: {kind(s)}" for f, s in definition.get("properties", {}).items())
        about = " ".join(definition.get("description", "").split())
        text += f"| {name} | {fields or kind(definition)} | {about} |\n"
    return text


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, SCRIPT, with_part(PAGE, "fields", SCRIPT, tables())))
