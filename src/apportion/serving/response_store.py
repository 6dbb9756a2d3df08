"""The latest responses, held in memory so that a client can go on after one. Gone with the process."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from apportion.serving.protocol.errors import HttpError

MAX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """response: as it was answered, in JSON. messages: the conversation up to its end, without its instructions."""

    response: bytes
    messages: list[dict[str, Any]]
    num_bytes: int


class ResponseStore:
    """Forgets what was asked for longest ago, once all of it together is larger than max_bytes."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._held: OrderedDict[str, StoredResponse] = OrderedDict()
        self.num_bytes = 0

    def put(self, response_id: str, stored: StoredResponse) -> None:
        self._held[response_id] = stored
        self.num_bytes += stored.num_bytes
        while self.num_bytes > self._max_bytes:
            self.num_bytes -= self._held.popitem(last=False)[1].num_bytes

    def get(self, response_id: str, *, param: str | None = None) -> StoredResponse:
        """Errors: HttpError 404."""
        stored = self._held.get(response_id)
        if stored is None:
            message = f"the response {response_id!r} is not held: it was never stored, or others have taken its place since"
            raise HttpError(404, message, param=param, code="response_not_found")
        self._held.move_to_end(response_id)
        return stored

    def remove(self, response_id: str) -> None:
        """Errors: HttpError 404."""
        self.num_bytes -= self.get(response_id).num_bytes
        del self._held[response_id]
