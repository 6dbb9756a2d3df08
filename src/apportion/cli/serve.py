"""`apportion serve`: the OpenAI-compatible server. Flags are spelt as `vllm serve` spells them where they mean the same."""

from __future__ import annotations

import argparse
from argparse import BooleanOptionalAction
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from apportion import __version__
from apportion.assets import DEFAULT_MODEL
from apportion.cli.flags import add_engine_flags, engine_keywords, parse_bytes
from apportion.core.errors import InvalidParameter
from apportion.serving.config import ServeConfig

DEFAULT_NAME = "apportion"  # of the bundled model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folders or hub ids, or NAME=FOLDER_OR_ID (default: the bundled model)")
    server = parser.add_argument_group("server", argument_default=argparse.SUPPRESS)
    server.add_argument("--config", action=_ConfigFile, metavar="FILE", help="YAML of these flags; what the command line says wins")
    server.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    server.add_argument("--port", type=int, help="0 takes a free one (default: 8000)")
    server.add_argument("--uds", metavar="PATH", help="listen on a Unix socket instead")
    server.add_argument("--root-path", metavar="PATH", help="where a proxy has put this server")
    server.add_argument("--timeout-keep-alive", type=int, metavar="S", help="how long an idle connection stays (default: 5)")
    server.add_argument(
        "--shutdown-timeout", type=float, metavar="S", help="how long running requests may go on after SIGTERM (default: 30)"
    )
    server.add_argument("--max-engine-restarts", type=int, metavar="N", help="deaths of the engine that are survived (default: 3)")
    add_model_flags(parser)
    access = parser.add_argument_group("access", argument_default=argparse.SUPPRESS)
    access.add_argument("--api-key", nargs="+", metavar="KEY", help="any of these is asked for on all but probes and the page")
    access.add_argument("--allowed-origins", nargs="+", metavar="ORIGIN", help="of web pages that may call this server (CORS); * for all")
    access.add_argument("--allowed-methods", nargs="+", metavar="METHOD")
    access.add_argument("--allowed-headers", nargs="+", metavar="HEADER")
    access.add_argument("--allow-credentials", action=BooleanOptionalAction)
    access.add_argument("--ssl-keyfile", metavar="FILE", help="TLS: the key")
    access.add_argument("--ssl-certfile", metavar="FILE", help="TLS: the certificate")
    access.add_argument("--ssl-ca-certs", metavar="FILE", help="TLS: who signs clients' certificates")
    access.add_argument("--ssl-cert-reqs", type=int, choices=[0, 1, 2], help="TLS: 2 asks clients for a certificate")
    limits = parser.add_argument_group("limits", argument_default=argparse.SUPPRESS)
    limits.add_argument("--max-queued-requests", type=int, metavar="N", help="of a model that may wait before 429 (default: 2048)")
    limits.add_argument("--max-body-bytes", type=parse_bytes, metavar="BYTES", help="of a request before 413 (default: 32MiB)")
    limits.add_argument("--body-timeout", type=float, metavar="S", help="for a body to arrive before 408 (default: 30)")
    limits.add_argument("--request-timeout", type=float, metavar="S", help="for an answer to be complete before 504 (default: none)")
    limits.add_argument(
        "--step-timeout", type=float, metavar="S", help="a busy engine without a step for so long is not ready (default: 60)"
    )
    watching = parser.add_argument_group("watching", argument_default=argparse.SUPPRESS)
    watching.add_argument("--log-format", choices=["text", "json"])
    watching.add_argument("--log-file", metavar="FILE", help="append to it instead of standard error")
    watching.add_argument("--disable-uvicorn-access-log", dest="disable_access_log", action=BooleanOptionalAction)
    watching.add_argument("--metrics-prefix", metavar="NAME", help="of every metric; vllm for dashboards made for it (default: apportion)")
    watching.add_argument("--metrics-port", type=int, metavar="PORT", help="serve /metrics there, without a key, and not here")
    watching.add_argument("--metrics-host", metavar="HOST", help="with --metrics-port (default: 127.0.0.1)")
    watching.add_argument("--otlp-traces-endpoint", metavar="URL", help="send a trace of every request there, by OTLP over HTTP")
    add_engine_flags(parser, model=False)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    models = parser.add_argument_group("models", argument_default=argparse.SUPPRESS)
    models.add_argument("--served-model-name", nargs="+", metavar="NAME", help="what the only model is called; more than one are aliases")
    models.add_argument("--models-dir", metavar="FOLDER", help="each folder in it is a model, loaded when it is asked for")
    models.add_argument(
        "--model-memory", type=parse_bytes, metavar="BYTES", help="for the weights of loaded models (default: what is free)"
    )
    models.add_argument("--tokenizer", metavar="FOLDER_OR_ID", help="where the tokenizer is, if not beside the model")
    models.add_argument("--chat-template", metavar="FILE", help="jinja2 template instead of the models' own")
    models.add_argument("--enable-auto-tool-choice", action=BooleanOptionalAction, help="let models decide to call a tool (default: yes)")
    models.add_argument("--tool-call-parser", metavar="NAME", help="of tool calls: hermes, llama3_json, mistral (default: auto)")
    models.add_argument("--reasoning-parser", metavar="NAME", help="how models write thoughts: think, none (default: auto)")
    models.add_argument("--trust-request-chat-template", action=BooleanOptionalAction, help="let requests bring a template of their own")
    models.add_argument("--generation-config", choices=["auto", "vllm"], help="auto: defaults of sampling come from the checkpoint")


def run(args: argparse.Namespace) -> int:
    from apportion.serving.run import run as serve

    return serve(serve_config(args))


def serve_config(args: argparse.Namespace) -> ServeConfig:
    """Errors: InvalidParameter for models of one name, names without a model, files that cannot be read."""
    models, preload = _models(args.models or getattr(args, "file_models", []), getattr(args, "models_dir", None))
    models, preload, aliases = _renamed(models, preload, getattr(args, "served_model_name", []))
    fields = {name: value for name, value in vars(args).items() if name in ServeConfig.__dataclass_fields__ and name != "models"}
    for name in ("api_key", "allowed_origins", "allowed_methods", "allowed_headers"):
        if name in fields:
            fields[name] = tuple(fields[name])
    if "chat_template" in fields:
        fields["chat_template"] = _read(fields["chat_template"], "chat template")
    return ServeConfig(models=models, aliases=aliases, preload=preload, engine=engine_keywords(args), version=__version__, **fields)


def _models(named: Sequence[str], folder: str | None) -> tuple[dict[str, str], tuple[str, ...]]:
    """Every model by name, and which are loaded at start: those that were named, or the first of the folder."""
    models: dict[str, str] = {}
    for entry in named or ([] if folder else [f"{DEFAULT_NAME}={DEFAULT_MODEL}"]):
        name, _, path = entry.rpartition("=")
        name = name or (Path(path).expanduser().resolve().name if Path(path).expanduser().is_dir() else path)
        if name in models:
            raise InvalidParameter(f"two models are called {name!r}; write NAME=FOLDER_OR_ID")
        models[name] = path
    preload = tuple(models)
    for found in sorted(Path(folder).expanduser().glob("*/config.json")) if folder else []:
        models.setdefault(found.parent.name, str(found.parent))
    if not models:
        raise InvalidParameter(f"{folder} holds no model: no folder in it has a config.json")
    return models, preload or (next(iter(models)),)


def _renamed(
    models: dict[str, str], preload: tuple[str, ...], served: Sequence[str]
) -> tuple[dict[str, str], tuple[str, ...], dict[str, str]]:
    if not served:
        return models, preload, {}
    if len(models) != 1:
        raise InvalidParameter("--served-model-name is for a single model; with several write NAME=FOLDER_OR_ID")
    return {served[0]: next(iter(models.values()))}, (served[0],), dict.fromkeys(served[1:], served[0])


def _read(path: str, what: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidParameter(f"the {what} {path} cannot be read: {error}") from error


class _ConfigFile(argparse.Action):
    """Parses the file's entries as flags of their own; they fill what the command line leaves open, wherever --config stands."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        try:
            content = yaml.safe_load(_read(str(values), "configuration"))
        except (yaml.YAMLError, InvalidParameter) as error:
            parser.error(str(error))
        if not isinstance(content, dict):
            parser.error(f"{values} must hold a mapping of flags to values")
        named = content.pop("models", None) or content.pop("model", None) or []
        namespace.file_models = [named] if isinstance(named, str) else [str(name) for name in named]
        for name, value in vars(parser.parse_args([a for key, v in content.items() for a in _flag(str(key), v)])).items():
            if name != "models" and not hasattr(namespace, name):
                setattr(namespace, name, value)


def _flag(key: str, value: Any) -> list[str]:
    """'enable-prefix-caching: false' as it would be typed."""
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
