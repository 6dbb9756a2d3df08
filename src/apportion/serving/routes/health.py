"""Probes, the version and the metrics. A probe generates nothing and never waits for the engine.

/livez: this process answers. /readyz and /health: the engine answers, and has finished a step recently if it has work.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from apportion.serving.protocol.errors import HttpError
from apportion.serving.server import server_of

router = APIRouter(tags=["operations"])
metrics_router = APIRouter(tags=["operations"])  # left out where metrics have an address of their own

PUBLIC_PATHS = frozenset({"/livez", "/readyz", "/health", "/ping"})  # need no key


@router.get("/livez")
async def livez() -> dict[str, str]:
    return {"status": "alive"}


@router.get("/readyz")
async def readyz(request: Request) -> dict[str, str]:
    server = server_of(request)
    reason = server.engine.why_not_ready(server.config.step_timeout)
    if reason is not None:
        raise HttpError(503, reason, code="not_ready", words=server.engine.last_words if not server.engine.is_ready else None)
    return {"status": "ready"}


@router.get("/health")
async def health(request: Request) -> dict[str, str]:
    return await readyz(request)


@router.get("/ping")
async def ping(request: Request) -> dict[str, str]:
    return await readyz(request)


@router.get("/version")
async def version(request: Request) -> dict[str, str]:
    return {"version": server_of(request).config.version}


@metrics_router.get("/metrics", response_class=Response)
async def prometheus(request: Request) -> Response:
    metrics = server_of(request).metrics
    return Response(metrics.exposition(), headers={"content-type": metrics.content_type})


@router.post("/debug/integrity")
async def integrity(request: Request) -> dict[str, str]:
    """Account for every block of KV memory; takes time in proportion to the blocks held."""
    await server_of(request).engine.check_integrity()
    return {"status": "every block is accounted for"}
