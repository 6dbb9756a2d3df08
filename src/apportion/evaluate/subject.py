"""What is evaluated: a model behind the face of the engine, and how a report names it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from apportion.core.config import EngineConfig
from apportion.core.errors import InvalidRequest
from apportion.core.model_hash import model_hash
from apportion.core.outputs import RequestOutput
from apportion.core.sampling_params import SamplingParams
from apportion.engine.engine import Engine
from apportion.processor.tokenizer import Tokenizer


class Subject(Protocol):
    """The part of `apportion.LLM` that an evaluation needs."""

    config: EngineConfig
    engine: Engine
    tokenizer: Tokenizer

    def generate(
        self, prompts: Sequence[Mapping[str, Any]], sampling_params: SamplingParams | Sequence[SamplingParams]
    ) -> list[RequestOutput]: ...

    def render_chat(self, messages: Sequence[Mapping[str, Any]], chat_template: str | None = None, **variables: Any) -> str: ...


def max_model_len(llm: Subject) -> int:
    return next(iter(llm.engine.models.values())).scheduler.max_model_len


def vocab_of(llm: Subject) -> int:
    return next(iter(llm.engine.models.values())).spec.vocab


def run_batch(llm: Subject, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]) -> list[RequestOutput]:
    """All prompts (token ids) in one run of the engine. Errors: InvalidRequest when one of them fails, as it says."""
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    for output in outputs:
        for completion in output.outputs:
            if completion.finish_reason == "error":
                raise InvalidRequest(f"the model failed on a sequence of {len(output.prompt_token_ids)} tokens: {completion.error}")
    return outputs


def describe(llm: Subject) -> dict[str, Any]:
    """A model in a report: name, hash, engine settings, and what it takes.

    weight_bytes: as the engine holds them. kv_bytes_per_token: of the KV cache, all layers and ranks.
    """
    [model] = llm.engine.models.values()
    config = asdict(llm.config)
    settings = config["models"][0] | config["cache"] | config["scheduler"] | config["parallel"]
    settings |= {"device": llm.config.device, "kernels": llm.config.kernels, "num_threads": llm.config.resolved_num_threads}
    for name in ("name", "model", "tokenizer"):
        settings.pop(name)
    return {
        "model": llm.config.models[0].model,
        "model_hash": model_hash(Path(llm.config.models[0].model)),
        "weight_bytes": model.weights.num_bytes if model.weights else None,
        "kv_bytes_per_token": sum(group.token_bytes for group in model.kv_groups) * llm.config.parallel.tensor_parallel_size,
        "engine": settings,
    }
