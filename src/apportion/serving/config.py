"""What `apportion serve` was asked for, as one frozen dataclass. Names are those of `vllm serve` where they mean the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from apportion.core.errors import InvalidParameter
from apportion.serving.tool_parsers.formats import check_parsers


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """models: name -> folder or hub id, in the order given; aliases: further names for these. preload: names to load at start.
    engine: keywords of core.keywords.

    enable_auto_tool_choice: let models decide to call a tool. trust_request_chat_template: let requests bring their own; a template
    can loop for as long as it likes. api_key: any of these opens the API; empty for an open server. metrics_port: /metrics moves
    there, without a key. max_queued_requests: sequences of a model that may wait beside the max_num_seqs that run.

    Times in seconds. request_timeout: from arrival to the last token. body_timeout: for a request's body to arrive. step_timeout:
    without a finished step for so long, a busy engine is not ready.

    model_memory: bytes for the weights of loaded models; None is what memory leaves.
    max_engine_restarts: deaths of the engine process before the server gives up. version: what /version tells.
    """

    models: Mapping[str, str]
    preload: tuple[str, ...]
    engine: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    tokenizer: str | None = None
    model_memory: int | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    api_key: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = 0
    root_path: str = ""
    chat_template: str | None = None
    enable_auto_tool_choice: bool = True
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    trust_request_chat_template: bool = False
    generation_config: str = "auto"
    max_body_bytes: int = 32 * 2**20
    max_queued_requests: int = 2048  # as many prompts as OpenAI takes in one request
    request_timeout: float | None = None
    body_timeout: float = 30.0
    timeout_keep_alive: int = 5
    shutdown_timeout: float = 30.0
    step_timeout: float = 60.0
    max_engine_restarts: int = 3
    metrics_prefix: str = "apportion"
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = None
    otlp_traces_endpoint: str | None = None
    log_format: str = "text"
    log_file: str | None = None
    disable_access_log: bool = False
    version: str = ""

    def __post_init__(self) -> None:
        if not self.models:
            raise InvalidParameter("a server needs at least one model")
        for name in ("max_body_bytes", "max_queued_requests", "body_timeout", "step_timeout"):
            if getattr(self, name) <= 0:
                raise InvalidParameter(f"{name} must be greater than 0, got {getattr(self, name)}")
        if self.request_timeout is not None and self.request_timeout <= 0:
            raise InvalidParameter(f"request_timeout must be greater than 0, got {self.request_timeout}")
        for name in ("shutdown_timeout", "max_engine_restarts", "timeout_keep_alive"):
            if getattr(self, name) < 0:
                raise InvalidParameter(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.port <= 65535:
            raise InvalidParameter(f"port must be between 0 and 65535, got {self.port}")
        if bool(self.ssl_keyfile) != bool(self.ssl_certfile):
            raise InvalidParameter("TLS needs both ssl_keyfile and ssl_certfile")
        check_parsers(self.tool_call_parser, self.reasoning_parser)
        if self.log_format not in ("text", "json"):
            raise InvalidParameter(f"unknown log_format {self.log_format!r}; known: text, json")
        if self.generation_config not in ("auto", "vllm"):
            raise InvalidParameter(f"unknown generation_config {self.generation_config!r}; known: auto, vllm")
