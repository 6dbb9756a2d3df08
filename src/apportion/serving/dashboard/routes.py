"""`/` and its files, which hold nothing secret and need no key, and `/stats`, which does."""

from __future__ import annotations

from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response

from apportion.serving.dashboard.stats import collect_stats
from apportion.serving.protocol.errors import HttpError
from apportion.serving.server import server_of

router = APIRouter()

STATIC = Path(__file__).parent / "static"
FILES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "theme.js": "text/javascript; charset=utf-8",
    "main.js": "text/javascript; charset=utf-8",
    "api.js": "text/javascript; charset=utf-8",
    "chat.js": "text/javascript; charset=utf-8",
    "live.js": "text/javascript; charset=utf-8",
    "text.js": "text/javascript; charset=utf-8",
}
PUBLIC_PATHS = frozenset({"/", *(f"/dashboard/{name}" for name in FILES)})

# Nothing from elsewhere, nothing inline: what a model writes can never run, and the page never leaves the server.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/", include_in_schema=False)
async def page(request: Request) -> Response:
    return _file(request, "index.html")


@router.get("/dashboard/{name}", include_in_schema=False)
async def static_file(name: str, request: Request) -> Response:
    if name not in FILES:
        raise HttpError(404, f"the page has no file {name!r}")
    return _file(request, name)


@router.get("/stats", tags=["operations"])
async def stats(request: Request) -> dict[str, Any]:
    return collect_stats(server_of(request))


def _file(request: Request, name: str) -> Response:
    body, etag = _read(name)
    headers = {**HEADERS, "ETag": etag}
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type=FILES[name])


@cache
def _read(name: str) -> tuple[bytes, str]:
    body = (STATIC / name).read_bytes()
    return body, f'"{blake2b(body, digest_size=8).hexdigest()}"'
