"""`apportion.quantize`: a quantized checkpoint of a model, and a report of what it cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from apportion.compress.quantize import Progress, quantize_checkpoint
from apportion.compress.recipe import Recipe, read_recipe
from apportion.compress.report import write_report
from apportion.core.errors import InvalidParameter
from apportion.evaluate.text import is_jsonl, read_documents, read_jsonl, read_text
from apportion.models.checkpoint import resolve_folder
from apportion.processor.tokenizer import Tokenizer


def quantize(
    model: str,
    output: str | Path,
    scheme: str | None = None,
    method: str | None = None,
    calibration: str | Path | Sequence[str] | Sequence[Sequence[int]] | None = None,
    ignore: Iterable[str] | None = None,
    format: str = "compressed-tensors",
    kv_cache: bool = False,
    num_samples: int = 128,
    max_seq_len: int = 512,
    token_weights: Sequence[Sequence[float]] | None = None,
    recipe: str | Path | Recipe | None = None,
    evaluate: str | Path | Sequence[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `model` (a folder or hub id) quantized into the folder `output`; returns the report (output/quantization_report.json, .html).

    scheme: fp8 (unless given), fp8_static, fp8_block, w8a8, w8a16, w4a16, w4a16_asym, w3a16, w2a16, or the name of any scheme. method: rtn
    (unless given; needs no data unless inputs have static scales), gptq, awq, smoothquant. calibration: a file (text, or .jsonl with
    'text', 'prompt' or 'messages'), texts, or token ids; `num_samples` sequences of at most `max_seq_len` tokens are taken. ignore:
    linears that stay as they are (lm_head unless given); 're:' starts an expression. format: compressed-tensors or fp8 (AutoFP8, vLLM).
    kv_cache: calibrate k_scale and v_scale. token_weights: of each calibration token, in the statistics of every method. recipe: a YAML
    file in llm-compressor's terms, in place of scheme, method, ignore and kv_cache. evaluate: a file or texts on which the loss against
    the original in float32 is measured. Errors: InvalidParameter, Unsupported, CheckpointError.
    """
    if recipe is None:
        names = ("lm_head",) if ignore is None else tuple(ignore)
        recipe = Recipe.of(scheme or "fp8", method or "rtn", names, family=format, kv_cache=kv_cache)
    elif (scheme, method, ignore, kv_cache) != (None, None, None, False):
        raise InvalidParameter("a recipe says scheme, method, ignore and kv_cache itself")
    elif not isinstance(recipe, Recipe):
        recipe = read_recipe(Path(recipe), format)
    documents = _documents(evaluate)
    tokens = calibration_tokens(model, calibration, num_samples, max_seq_len) if calibration is not None else []
    if token_weights is not None and list(map(len, token_weights)) != list(map(len, tokens)):
        raise InvalidParameter("token_weights must have one number for each calibration token")
    report = quantize_checkpoint(model, Path(output), recipe, tokens, token_weights, progress)
    if documents:
        report["evaluation"] = _measured_loss(model, Path(output), documents)
        write_report(report, Path(output))
    return report


def _documents(evaluate: str | Path | Sequence[str] | None) -> list[str]:
    if evaluate is None:
        return []
    return read_documents(Path(evaluate)) if isinstance(evaluate, (str, Path)) else list(evaluate)


def _measured_loss(model: str, quantized: Path, documents: list[str]) -> dict[str, Any]:
    """The record of `apportion eval compare`: the quantized model, and the original in bfloat16, against the original in float32."""
    from apportion.evaluate.compare import comparison_report
    from apportion.llm import LLM

    with LLM(model, dtype="float32") as original, LLM(quantized) as candidate, LLM(model, dtype="bfloat16") as floor:
        return comparison_report(original, candidate, documents, floor=floor).as_dict()


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
    """The texts of a calibration file, plain or packed (.gz, .xz)."""
    if not is_jsonl(path):
        return [read_text(path)]
    texts = []
    for number, row in enumerate(read_jsonl(path), 1):
        try:
            text = row["text"] if "text" in row else row["prompt"] if "prompt" in row else _joined(row["messages"])
        except (KeyError, TypeError) as error:
            raise InvalidParameter(f"entry {number} of {path} must have 'text', 'prompt' or 'messages'") from error
        texts.append(text)
    return texts


def _joined(messages: Sequence[dict[str, str]]) -> str:
    return "\n".join(message["content"] for message in messages)
