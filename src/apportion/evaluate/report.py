"""The one record of what a measurement found: bytes, time, and loss with its interval, so that one budget can be spent over all of them.

Plain data: written as JSON, diffed, read by whoever decides (`apportion plan`) or compresses. Knows no model and no task.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from apportion.core.errors import InvalidParameter
from apportion.evaluate.statistics import Estimate

FORMAT, VERSION = "apportion-report", 1
_LIBRARIES = ("apportion", "torch", "numpy", "tokenizers")


@dataclass(slots=True, kw_only=True)
class Report:
    """One run of one task on one model.

    subject: see `subject.describe` (model, model_hash, weight_bytes, kv_bytes_per_token, engine settings); reference: the model it was
    held against, or None. loss: the name of the metric that says what is lost against the reference (smaller is better), or None.
    metrics: by name; floor: the same names for the A/A run (the reference against itself at another float precision): a loss inside it
    is noise. cells: of a grid or table, plain rows. samples: one row for each item; kept beside the record (samples.jsonl), not in it.
    settings: window, stride, grid, counts; seeds: by what they draw. wall_s: scoring alone, without loading. num_tokens: computed in it.
    """

    task: str
    subject: dict[str, Any]
    metrics: dict[str, Estimate]
    reference: dict[str, Any] | None = None
    loss: str | None = None
    floor: dict[str, Estimate] = field(default_factory=dict)
    cells: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    wall_s: float = 0.0
    num_tokens: int = 0
    command: str = ""
    created: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    environment: dict[str, str] = field(default_factory=lambda: environment())

    @property
    def tokens_per_s(self) -> float | None:
        return self.num_tokens / self.wall_s if self.wall_s else None

    def as_dict(self) -> dict[str, Any]:
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "samples"}
        for name in ("metrics", "floor"):
            content[name] = {key: estimate.as_dict() for key, estimate in content[name].items()}
        return {"format": FORMAT, "version": VERSION, **content, "tokens_per_s": self.tokens_per_s}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Report:
        """Errors: InvalidParameter when it is no such record, or one of a later version."""
        if content.get("format") != FORMAT or content.get("version") != VERSION:
            raise InvalidParameter(
                f"not a {FORMAT} of version {VERSION}: format {content.get('format')!r}, version {content.get('version')!r}"
            )
        values = {f.name: content[f.name] for f in fields(cls) if f.name in content}
        missing = {"task", "subject", "metrics"} - values.keys()
        if missing:
            raise InvalidParameter(f"a {FORMAT} without {', '.join(sorted(missing))}")
        for name in ("metrics", "floor"):
            values[name] = {key: Estimate(**estimate) for key, estimate in values.get(name, {}).items()}
        return cls(**values)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Report:
        """Errors: InvalidParameter naming the file."""
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InvalidParameter(f"{path} is no report: {error}") from error


def environment() -> dict[str, str]:
    """What else a number depends on: machine and library versions."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "cpu": _cpu_name()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
