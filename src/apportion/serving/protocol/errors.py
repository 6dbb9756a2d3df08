"""Every error as HTTP: a status and OpenAI's error object, which names the field (param) and the cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from apportion.core.errors import ApportionError, InvalidInput, OutOfMemory, Unsupported
from apportion.serving.async_engine import EngineDead, QueueFull
from apportion.serving.messages import LastWords

RETRY_AFTER_S = 1
FIELDS_OF_ONE_WORD = frozenset({"n", "temperature", "stop", "seed", "logprobs", "input", "dimensions", "tools", "messages"})
INVALID = "invalid_request_error"
KINDS = {
    400: INVALID, 401: "authentication_error", 403: "permission_error", 404: "not_found_error", 405: INVALID, 408: "timeout_error",
    413: INVALID, 415: INVALID, 429: "rate_limit_error", 499: "client_gone", 503: "service_unavailable_error", 504: "timeout_error",
}  # fmt: skip


class HttpError(Exception):
    """status and what goes into the error object. param: the field it is about. words: the engine process's own report."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, words: LastWords | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.words = status, message, param, code, words

    @property
    def kind(self) -> str:
        return KINDS.get(self.status, "server_error")

    @property
    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(RETRY_AFTER_S)} if self.status in (429, 503) else {}

    def body(self) -> dict[str, Any]:
        """{"error": ...} as OpenAI shapes it; `cause` beside it when a process died of something."""
        error: dict[str, Any] = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code or self.status}
        if self.words is not None:
            error["cause"] = msgspec.structs.asdict(self.words)
        return {"error": error}


def to_http(error: Exception) -> HttpError:
    """What a caller is told of `error`."""
    match error:
        case HttpError():
            return error
        case EngineDead():
            return HttpError(503, str(error), code="engine_dead", words=error.words)
        case QueueFull():
            return HttpError(429, str(error), code="queue_full")
        case OutOfMemory():
            return HttpError(503, str(error), code="out_of_memory")
        case Unsupported():
            return HttpError(400, str(error), code="unsupported")
        case InvalidInput():
            return HttpError(400, str(error), param=_param(str(error)))
        case TimeoutError():
            return HttpError(504, str(error) or "the request took longer than the server allows", code="timeout")
        case ApportionError():
            return HttpError(500, str(error))
    return HttpError(500, f"{type(error).__name__}: {error}")


def from_validation(errors: Sequence[Mapping[str, Any]], body: Any = None) -> HttpError:
    """A body that does not fit its schema: what is wrong with it, by its place.

    A value that fits no branch of a union has an error for each: the one that came furthest is told.
    """
    places = [_place(error["loc"], body, error["type"] == "missing") for error in errors]
    furthest = max(range(len(errors)), key=lambda i: (len(places[i]), places[i][-1:] == ["type"]))
    first, place = errors[furthest], ".".join(map(str, places[furthest])) or None
    match first["type"]:
        case "extra_forbidden":
            return HttpError(400, f"unknown or unsupported field {place!r}", param=place, code="unknown_field")
        case "missing" if place is None:
            return HttpError(400, "the request has no body: send a JSON object", code="missing_body")
        case "missing":
            return HttpError(400, f"the field {place!r} is missing", param=place, code="missing_field")
        case "union_tag_invalid":
            wrong, known = first["ctx"]["tag"], first["ctx"]["expected_tags"]
            return HttpError(400, f"{place}: unknown or unsupported type {wrong!r}; known: {known}", param=place, code="invalid_value")
        case "json_invalid":
            reason = first.get("ctx", {}).get("error", first["msg"])
            return HttpError(400, f"the body is not valid JSON: {reason}", code="invalid_json")
    message = str(first["msg"])
    return HttpError(400, f"{place}: {message[0].lower()}{message[1:]}" if place else message, param=place, code="invalid_value")


def _place(loc: Sequence[int | str], body: Any, is_missing: bool) -> list[int | str]:
    """Of pydantic's location, what stands in the body: not the names of a union's branches."""
    place: list[int | str] = []
    for i, part in enumerate(loc):
        if (isinstance(body, dict) and part in body) or (isinstance(body, list) and isinstance(part, int) and part < len(body)):
            body = body[part]  # type: ignore[index]  # a list's part is its index
            place.append(part)
        elif is_missing and i == len(loc) - 1 and part != "body":
            place.append(part)
    return place


def _param(message: str) -> str | None:
    """Messages about a parameter begin with its name."""
    word = message.partition(" ")[0].partition("[")[0]
    return word if (word.isidentifier() and "_" in word) or word in FIELDS_OF_ONE_WORD else None
