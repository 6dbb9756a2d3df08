"""What routes share: the engine, the models it knows and their tokenizers, the configuration. Made once, in the API process."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from starlette.requests import Request

from apportion.core.config import EngineConfig
from apportion.processor.tokenizer import Tokenizer
from apportion.serving.async_engine import AsyncEngine
from apportion.serving.config import ServeConfig
from apportion.serving.conversation import ChatFormat
from apportion.serving.engine_link import EngineLink
from apportion.serving.messages import ModelInfo, ModelState
from apportion.serving.metrics import Metrics
from apportion.serving.protocol.errors import HttpError
from apportion.serving.response_store import ResponseStore
from apportion.serving.tracing import Tracer

logger = logging.getLogger(__name__)

Prompt = tuple[list[int], str | None]  # token ids, and the text they came from
THREAD_TEXT_LEN = 4_000  # characters: longer texts are tokenized on a thread, so that streams go on


@dataclass(slots=True)
class ServedModel:
    """A model that is loaded, with what turns text into its tokens."""

    info: ModelInfo
    tokenizer: Tokenizer

    @property
    def name(self) -> str:
        return self.info.name

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Errors: InvalidRequest for text that is no Unicode."""
        [(token_ids, _)] = await self.encode_prompts([text], add_special_tokens)
        return token_ids

    async def encode_prompts(self, prompts: Sequence[str] | Sequence[list[int]], add_special_tokens: bool) -> list[Prompt]:
        """Texts and their tokens; token ids as they are. Errors: those of `encode`."""

        def encode() -> list[Prompt]:
            return [(self.tokenizer.encode(p, add_special_tokens), p) if isinstance(p, str) else (p, None) for p in prompts]

        is_short = len(prompts) == 1 and len(prompts[0]) < THREAD_TEXT_LEN
        return encode() if is_short else await asyncio.to_thread(encode)


@dataclass(slots=True)
class Server:
    """tokenizers: of every model that was loaded once. exit_reason: set when the server cannot go on. started_s: unix time."""

    config: ServeConfig
    engine_config: EngineConfig
    engine: AsyncEngine
    metrics: Metrics
    tracer: Tracer | None = None
    models: dict[str, ModelInfo] = field(default_factory=dict)
    tokenizers: dict[str, Tokenizer] = field(default_factory=dict)
    responses: ResponseStore = field(default_factory=ResponseStore)
    exit_reason: str | None = None
    started_s: int = field(default_factory=lambda: int(time.time()))

    def time_left(self, request: Request) -> float | None:
        """Seconds until the answer must be complete; None for no limit."""
        limit = self.config.request_timeout
        return None if limit is None else max(0.0, request.scope["state"]["arrival_s"] + limit - time.monotonic())

    async def loaded_model(self, name: str | None, request: Request) -> ServedModel:
        """The model a request names, loaded if it was not; None is the first.

        Errors: HttpError 404; TimeoutError when loading takes longer than the request may; whatever loading raises.
        """
        info = self.model_info(name)
        if info.state is not ModelState.LOADED:
            async with asyncio.timeout(self.time_left(request)):
                await self.engine.load_model(info.name)
            info = self.models[info.name]
        return ServedModel(info, self.tokenizers[info.name])

    def model_info(self, name: str | None) -> ModelInfo:
        if not self.models:
            raise HttpError(503, self.engine.why_not_ready(self.config.step_timeout) or "the engine is starting", code="engine_starting")
        if name is None:
            return next(iter(self.models.values()))
        info = self.models.get(self.config.aliases.get(name, name))
        if info is None:
            known = ", ".join(self.models)
            raise HttpError(404, f"the model {name!r} does not exist; known: {known}", param="model", code="model_not_found")
        return info

    def chat_format(self, model: ServedModel) -> ChatFormat:
        config = self.config
        return ChatFormat(model.tokenizer, config.tool_call_parser, config.reasoning_parser, config.enable_auto_tool_choice)

    def require_trust(self, chat_template: str | None) -> None:
        """A template is a program. Errors: HttpError 400 for one of the request's own where that is not allowed."""
        if chat_template is not None and not self.config.trust_request_chat_template:
            raise HttpError(400, "chat_template needs a server started with --trust-request-chat-template", param="chat_template")

    async def take_models(self, infos: list[ModelInfo]) -> None:
        """Remember what the engine says, and read the tokenizers of models that are new here."""
        for info in infos:
            if info.tokenizer_folder and info.name not in self.tokenizers:
                tokenizer = await asyncio.to_thread(Tokenizer.from_folder, info.tokenizer_folder)
                if self.config.chat_template is not None:
                    tokenizer = tokenizer.with_chat_template(self.config.chat_template)
                self.tokenizers[info.name] = tokenizer
        if not self.models:
            gc.collect()
            gc.freeze()  # a full collection would walk what was imported, 0.1 s in which nothing is answered
            logger.info("ready: %s", ", ".join(info.name for info in infos if info.state is ModelState.LOADED))
        self.models = {info.name: info for info in infos}


def server_of(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


def log_fields(request: Request, **fields: str | None) -> None:
    """What the request's log line tells beside what every line does; None is left out."""
    request.scope["state"].setdefault("log", {}).update({name: value for name, value in fields.items() if value is not None})


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid4().hex}"


def make_server(
    config: ServeConfig,
    engine: EngineConfig,
    link: EngineLink,
    make_link: Callable[[], EngineLink],
    metrics: Metrics,
    stop: Callable[[], Any],
) -> Server:
    """link: the first engine process; make_link starts further ones. stop: called when the server cannot go on."""

    async def on_models(infos: list[ModelInfo]) -> None:
        await server.take_models(infos)

    def on_fatal(reason: str) -> None:
        server.exit_reason = reason
        stop()

    async_engine = AsyncEngine(
        link,
        make_link,
        max_sequences=engine.scheduler.max_num_seqs + config.max_queued_requests,
        max_restarts=config.max_engine_restarts,
        on_models=on_models,
        on_fatal=on_fatal,
        metrics=metrics,
    )
    tracer = None if config.otlp_traces_endpoint is None else Tracer(config.otlp_traces_endpoint, config.version)
    server = Server(config, engine, async_engine, metrics, tracer)
    return server
