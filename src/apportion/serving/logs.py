"""Log lines of both processes: text or one JSON object a line. A line that cannot be written is counted, and nothing else happens."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO


class TextFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process}: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        fields: dict[str, Any] = getattr(record, "fields", {})
        return line + "".join(f" {name}={value}" for name, value in fields.items() if name not in ("method", "path", "status"))


class JsonFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class CountingHandler(logging.StreamHandler[TextIO]):
    """on_loss: called for each line that the disk or the reader does not take."""

    def __init__(self, stream: TextIO, on_loss: Callable[[], object]) -> None:
        super().__init__(stream)
        self._on_loss = on_loss

    def handleError(self, record: logging.LogRecord) -> None:
        self._on_loss()


def set_up_logs(process: str, log_format: str, stream: TextIO | None = None, on_loss: Callable[[], object] = lambda: None) -> None:
    """Send what this process logs to `stream` (standard error when None)."""
    handler = CountingHandler(stream or sys.stderr, on_loss)
    handler.setFormatter(JsonFormatter(process) if log_format == "json" else TextFormatter(process))
    root = logging.getLogger()
    root.handlers, root.level = [handler], logging.INFO
    for name in ("uvicorn", "uvicorn.error"):  # its lines about itself are said better by ours
        logging.getLogger(name).setLevel(logging.WARNING)
