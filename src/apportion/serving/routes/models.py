"""/v1/models, and loading and unloading them at run time."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from apportion.serving.messages import ModelInfo
from apportion.serving.protocol.openai import ModelRequest
from apportion.serving.server import Server, server_of

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    server = server_of(request)
    names = [(name, info) for info in server.models.values() for name in _names(server, info)]
    return {"object": "list", "data": [_card(server, name, info) for name, info in names]}


@router.get("/v1/models/{name:path}")
async def get_model(name: str, request: Request) -> dict[str, Any]:
    server = server_of(request)
    return _card(server, name, server.model_info(name))


@router.post("/v1/models/load")
async def load_model(body: ModelRequest, request: Request) -> dict[str, Any]:
    server = server_of(request)
    name = server.model_info(body.model).name
    await server.engine.load_model(name)
    return _card(server, body.model, server.models[name])


@router.post("/v1/models/unload")
async def unload_model(body: ModelRequest, request: Request) -> dict[str, Any]:
    server = server_of(request)
    name = server.model_info(body.model).name
    await server.engine.unload_model(name)
    return _card(server, body.model, server.models[name])


def _names(server: Server, info: ModelInfo) -> list[str]:
    return [info.name, *(alias for alias, name in server.config.aliases.items() if name == info.name)]


def _card(server: Server, name: str, info: ModelInfo) -> dict[str, Any]:
    """OpenAI's model object, with vLLM's root and max_model_len, and the state beside them."""
    return {
        "id": name,
        "object": "model",
        "created": server.started_s,
        "owned_by": "apportion",
        "root": server.config.models[info.name],
        "parent": None,
        "max_model_len": info.max_model_len or None,
        "state": info.state.value,
        "memory_bytes": info.weight_bytes or None,
        "error": info.error or None,
    }
