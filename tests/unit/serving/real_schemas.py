"""Fifty JSON schemas as people write them for extraction, tool calls, configuration and messages between services."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
SHORT: Schema = {"type": "string", "maxLength": 24}
NAME: Schema = {"type": "string", "minLength": 1, "maxLength": 16}
INTEGER: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 1000}
NUMBER: Schema = {"type": "number", "minimum": -1000, "maximum": 1000}
SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
FLAG: Schema = {"type": "boolean"}


def obj(required: str = "*", **properties: Schema) -> Schema:
    """A closed object. required: the names, or * for all."""
    names = list(properties) if required == "*" else required.split()
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def arr(items: Schema, low: int = 0, high: int = 3, **more: Any) -> Schema:
    return {"type": "array", "items": items, "minItems": low, "maxItems": high, **more}


def one_of(*values: Any) -> Schema:
    return {"enum": list(values)}


def text(pattern: str) -> Schema:
    return {"type": "string", "pattern": pattern}


def formatted(name: str) -> Schema:
    return {"type": "string", "format": name}


def maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


MONEY = obj(amount={"type": "number", "minimum": 0, "maximum": 10_000}, currency=one_of("EUR", "USD", "JPY"))
ADDRESS = obj("street city", street=SHORT, city=SHORT, zip=text("^[0-9]{5}$"), country=text("^[A-Z]{2}$"))

SCHEMAS: dict[str, Schema] = {
    # extraction
    "person": obj(name=NAME, age=COUNT, email=text(r"^[a-z]{1,8}@[a-z]{1,8}\.(com|org)$")),
    "person, half optional": obj("name", name=NAME, nickname=maybe(NAME), children=arr(NAME)),
    "address": ADDRESS,
    "invoice": obj(
        number=text("^INV-[0-9]{4}$"), date=formatted("date"), items=arr(obj(what=SHORT, quantity=COUNT, price=MONEY), 1, 2), total=MONEY
    ),
    "receipt with units": obj(lines=arr(obj(text=SHORT, cents=INTEGER | {"minimum": 0, "maximum": 99999}), 1, 3), paid=FLAG),
    "résumé": obj(
        name=NAME,
        skills=arr(SHORT),
        jobs=arr(obj("company", company=SHORT, start=text("^(19|20)[0-9]{2}$"), end=maybe(text("^20[0-9]{2}$")))),
    ),
    "recipe": obj(
        title=SHORT, minutes=COUNT, ingredients=arr(obj(name=SHORT, amount=NUMBER, unit=one_of("g", "ml", "piece")), 1), steps=arr(SHORT)
    ),
    "book": obj(
        title=SHORT,
        isbn=text("^97[89]-[0-9]-[0-9]{4}-[0-9]{4}-[0-9]$"),
        authors=arr(NAME, 1),
        year={"type": "integer", "minimum": 1450, "maximum": 2100},
    ),
    "medical note": obj(
        complaint=SHORT,
        vitals=obj(pulse=COUNT, temperature={"type": "number", "minimum": 30, "maximum": 45}),
        icd10=text(r"^[A-Z][0-9]{2}(\.[0-9]{1,2})?$"),
    ),
    "event": obj(title=SHORT, start=formatted("date-time"), duration=formatted("duration"), where=maybe(SHORT)),
    "contact card": obj("name", name=NAME, phones=arr(text(r"^\+[0-9]{6,12}$")), mail=formatted("email"), site=formatted("uri")),
    "named entities": arr(obj(text=SHORT, kind=one_of("person", "place", "organisation"), start=COUNT, end=COUNT), 0, 4),
    "relations": obj(
        triples=arr(
            {"type": "array", "prefixItems": [SHORT, one_of("is", "has", "knows"), SHORT], "minItems": 3, "maxItems": 3, "items": False}, 1
        )
    ),
    "table": obj(header=arr(SHORT, 2, 2), rows=arr(arr(SHORT, 2, 2), 0, 3)),
    # judgement
    "sentiment": obj(label=one_of("positive", "negative", "neutral"), score=SHARE),
    "yes or no": {"type": "boolean"},
    "one word": one_of("spam", "ham"),
    "rubric": obj(
        scores=obj(clarity={"type": "integer", "minimum": 1, "maximum": 5}, depth={"type": "integer", "minimum": 1, "maximum": 5}),
        why=SHORT,
    ),
    "ranking": arr({"type": "integer", "minimum": 1, "maximum": 9}, 3, 3),
    "moderation": obj(flagged=FLAG, categories=obj("", hate=FLAG, violence=FLAG, self_harm=FLAG)),
    "step by step": obj(steps=arr(obj(explanation=SHORT, output=SHORT), 1, 3), final_answer=SHORT),
    "multiple choice": obj(answer=one_of("A", "B", "C", "D"), sure=SHARE),
    # tools
    "get_weather": obj("city", city=SHORT, unit=one_of("celsius", "fahrenheit"), days={"type": "integer", "minimum": 1, "maximum": 7}),
    "search": obj("query", query=SHORT, filters=obj("", since=formatted("date"), language=text("^[a-z]{2}$")), limit=COUNT),
    "send_mail": obj("to subject body", to=arr(text("^[a-z]{1,6}@[a-z]{1,6}[.]org$"), 1), subject=SHORT, body=SHORT, urgent=FLAG),
    "sql": obj(
        table=text("^[a-z_]{1,12}$"),
        columns=arr(text("^[a-z_]{1,12}$"), 1),
        where=maybe(obj(column=SHORT, op=one_of("=", "<", ">"), value={"anyOf": [SHORT, NUMBER]})),
    ),
    "book_flight": obj(
        origin=text("^[A-Z]{3}$"), to=text("^[A-Z]{3}$"), date=formatted("date"), seat=obj("", row=COUNT, letter=text("^[A-F]$"))
    ),
    "shell": obj(command=arr(SHORT, 1), timeout_s=COUNT, env={"type": "object", "additionalProperties": SHORT, "maxProperties": 2}),
    "no arguments": obj(),
    "home assistant": {"oneOf": [obj(action={"const": "light"}, on=FLAG, level=COUNT), obj(action={"const": "door"}, locked=FLAG)]},
    # configuration
    "compose service": obj(
        "image",
        image=SHORT,
        ports=arr(text("^[0-9]{2,4}:[0-9]{2,4}$")),
        restart=one_of("no", "always"),
        environment={"type": "object", "additionalProperties": SHORT, "maxProperties": 2},
    ),
    "package": obj(
        "name version",
        name=text("^[a-z][a-z-]{0,12}$"),
        version=text(r"^[0-9]{1,2}\.[0-9]{1,2}\.[0-9]{1,2}$"),
        private=FLAG,
        keywords=arr(SHORT),
    ),
    "eslint-like": obj(
        rules={
            "type": "object",
            "additionalProperties": {"anyOf": [one_of("off", "warn", "error"), {"type": "integer", "minimum": 0, "maximum": 2}]},
            "maxProperties": 3,
        }
    ),
    "feature flags": {
        "type": "object",
        "patternProperties": {"^feature_[a-z]{1,6}$": FLAG},
        "additionalProperties": False,
        "maxProperties": 3,
    },
    "geometry": {
        "oneOf": [
            obj(type={"const": "Point"}, coordinates=arr(NUMBER, 2, 2)),
            obj(type={"const": "LineString"}, coordinates=arr(arr(NUMBER, 2, 2), 2, 3)),
        ]
    },
    "colour": {"anyOf": [text("^#[0-9a-f]{6}$"), arr({"type": "integer", "minimum": 0, "maximum": 255}, 3, 3)]},
    "cron": obj(
        minute={"anyOf": [{"const": "*"}, {"type": "integer", "minimum": 0, "maximum": 59}]},
        hour={"anyOf": [{"const": "*"}, {"type": "integer", "minimum": 0, "maximum": 23}]},
    ),
    "network": obj(ip=formatted("ipv4"), prefix={"type": "integer", "minimum": 8, "maximum": 30}, host=formatted("hostname")),
    # messages
    "webhook": obj(
        "id type",
        id=formatted("uuid"),
        type=one_of("created", "deleted"),
        at=formatted("date-time"),
        data={"type": "object", "maxProperties": 2, "additionalProperties": COUNT},
    ),
    "json-rpc": obj(
        "jsonrpc method",
        jsonrpc={"const": "2.0"},
        method=SHORT,
        id={"anyOf": [INTEGER | {"minimum": 0, "maximum": 99}, NAME]},
        params=arr(NUMBER),
    ),
    "order": {**obj(buyer=ref("person"), seller=ref("person"), price=ref("money")), "$defs": {"person": obj(name=NAME), "money": MONEY}},
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"id": COUNT}, "required": ["id"]},
            {"type": "object", "properties": {"tag": SHORT}, "required": ["tag"]},
        ]
    },
    "types as a list": obj(
        value={"type": ["integer", "null"], "minimum": 0, "maximum": 99}, text={"type": ["string", "null"], "maxLength": 9}
    ),
    "pydantic's optional": {
        "$defs": {"Level": {"enum": ["low", "high"], "title": "Level", "type": "string"}},
        "properties": {"level": {"$ref": "#/$defs/Level"}, "note": {"anyOf": [SHORT, {"type": "null"}], "default": None, "title": "Note"}},
        "required": ["level"],
        "title": "Alarm",
        "type": "object",
        "additionalProperties": False,
    },
    # shapes that are hard
    "linked list": {**ref("node"), "$defs": {"node": obj(value=COUNT, next=maybe(ref("node")))}},
    "tree": {**ref("node"), "$defs": {"node": obj("name", name=NAME, children=arr(ref("node"), 0, 2))}},
    "expression": {**ref("e"), "$defs": {"e": {"anyOf": [COUNT, obj(op=one_of("+", "*"), left=ref("e"), right=ref("e"))]}}},
    "any json": {},
    "an open object": {"type": "object"},
    "names beyond ascii": obj(**{"größe": COUNT, "名前": SHORT, 'a"b\\c': FLAG, "emoji 🙂": one_of("ja", "いいえ", "🙂")}),
    "many fields": obj(**{f"field_{i}": FLAG if i % 2 else COUNT for i in range(30)}),
    "deep": obj(a=obj(b=obj(c=obj(d=obj(e=obj(f=obj(g=one_of(1, 2)))))))),
    "numbers": obj(
        exact={"const": 3.5},
        step={"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
        open={"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    ),
}
