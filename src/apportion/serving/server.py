"""What routes share: the engine, the models it knows and their tokenizers, the configuration. Made once, in the API process."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
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

THREAD_TEXT_LEN = 20_000  # characters: longer texts are tokenized on a thread, so that streams go on


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
        if len(text) < THREAD_TEXT_LEN:
            return self.tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)


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

    async def loaded_model(self, name: str | None) -> ServedModel:
        """The model a request names, loaded if it was not; None is the first. Errors: HttpError 404; whatever loading raises."""
        info = self.model_info(name)
        if info.state is not ModelState.LOADED:
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
        return ChatFormat(model.tokenizer, self.config.tool_call_parser, self.config.reasoning_parser)

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
        max_sequences=engine.scheduler.max_num_seqs * len(config.models) + config.max_queued_requests,
        max_restarts=config.max_engine_restarts,
        on_models=on_models,
        on_fatal=on_fatal,
        metrics=metrics,
    )
    tracer = None if config.otlp_traces_endpoint is None else Tracer(config.otlp_traces_endpoint, config.version)
    server = Server(config, engine, async_engine, metrics, tracer)
    return server
