"""`apportion.quantize`: a quantized checkpoint of a model, and a report of what it cost."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from apportion.compress.quantize import Progress, Recipe, quantize_checkpoint
from apportion.core.errors import InvalidParameter
from apportion.models.checkpoint import resolve_folder
from apportion.processor.tokenizer import Tokenizer


def quantize(
    model: str,
    output: str | Path,
    scheme: str = "fp8",
    method: str = "rtn",
    calibration: str | Path | Sequence[str] | Sequence[Sequence[int]] | None = None,
    ignore: Iterable[str] = ("lm_head",),
    format: str = "compressed-tensors",
    kv_cache: bool = False,
    num_samples: int = 128,
    max_seq_len: int = 512,
    token_weights: Sequence[Sequence[float]] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `model` (a folder or hub id) quantized into the folder `output`; returns the report (output/quantization_report.json).

    scheme: fp8, fp8_static, fp8_block, w8a8, w8a16, w4a16, w4a16_asym, w3a16, w2a16, or the name of any scheme. method: rtn (needs no
    data unless inputs have static scales), gptq, awq, smoothquant. calibration: a file (text, or .jsonl with 'text', 'prompt' or
    'messages'), texts, or token ids; `num_samples` sequences of at most `max_seq_len` tokens are taken. ignore: projections that stay as
    they are; 're:' starts an expression. format: compressed-tensors or fp8 (AutoFP8, vLLM). kv_cache: calibrate k_scale and v_scale.
    token_weights: of each calibration token, in the statistics of every method.
    Errors: InvalidParameter, Unsupported, CheckpointError.
    """
    recipe = Recipe(scheme, method, tuple(ignore), format, kv_cache)
    tokens = calibration_tokens(model, calibration, num_samples, max_seq_len) if calibration is not None else []
    if token_weights is not None and list(map(len, token_weights)) != list(map(len, tokens)):
        raise InvalidParameter("token_weights must have one number for each calibration token")
    return quantize_checkpoint(model, Path(output), recipe, tokens, token_weights, progress)


def calibration_tokens(
    model: str, calibration: str | Path | Sequence[str] | Sequence[Sequence[int]], num_samples: int, max_seq_len: int
) -> list[list[int]]:
    """Sequences of at least two tokens: a long text is cut into several."""
    texts: list[Any] = _read(Path(calibration)) if isinstance(calibration, (str, Path)) else list(calibration)
    tokenizer = Tokenizer.from_folder(resolve_folder(model)) if any(isinstance(text, str) for text in texts) else None
    found: list[list[int]] = []
    for text in texts:
        ids = tokenizer.encode(text) if tokenizer is not None and isinstance(text, str) else [int(token) for token in text]
        found += [ids[i : i + max_seq_len] for i in range(0, len(ids), max_seq_len) if len(ids) - i > 1]
        if len(found) >= num_samples:
            break
    if not found:
        raise InvalidParameter("the calibration data holds no text")
    return found[:num_samples]


def _read(path: Path) -> list[str]:
    try:
        content = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidParameter(f"calibration file {path} cannot be read: {error}") from error
    if path.suffix != ".jsonl":
        return [content]
    texts = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = json.loads(line)
            text = row["text"] if "text" in row else row["prompt"] if "prompt" in row else _joined(row["messages"])
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidParameter(f"{path}:{number} must be an object with 'text', 'prompt' or 'messages'") from error
        texts.append(text)
    return texts


def _joined(messages: Sequence[dict[str, str]]) -> str:
    return "\n".join(message["content"] for message in messages)
