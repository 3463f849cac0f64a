"""The page at `/`, and the page of the API at /docs: files of ours and of packages, nothing from another host."""

import gzip
import hashlib
from pathlib import Path

import fastapi_offline
from fastapi import FastAPI, HTTPException, Request, Response
from starlette.datastructures import MutableHeaders
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as StarletteMessage

_PAGE = Path(__file__).parent / "page"
# Of fastapi-offline only its copy of Swagger UI: the page that it makes has a script within, which our policy forbids.
_SWAGGER = Path(fastapi_offline.__file__).parent / "static"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".md": "text/markdown; charset=utf-8",
}
_POLICY = "; ".join(
    [
        "default-src 'self'",
        "img-src 'self' data:",  # Swagger UI's icons
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    ]
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class _File:
    """A file of the page, kept in memory, also compressed: they are small, and a page asks for all of them at once."""

    def __init__(self, path: Path) -> None:
        self._body = path.read_bytes()
        self._compressed = gzip.compress(self._body, mtime=0)
        self._headers = {
            "content-type": _TYPES[path.suffix],
            "etag": f'"{hashlib.sha256(self._body).hexdigest()[:32]}"',
            "vary": "accept-encoding",
        }

    def reply(self, request: Request) -> Response:
        if request.headers.get("if-none-match") == self._headers["etag"]:
            return Response(status_code=304, headers=self._headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            return Response(self._compressed, headers=self._headers | {"content-encoding": "gzip"})
        return Response(self._body, headers=self._headers)


def add_pages(app: FastAPI) -> None:
    """`app` must not serve docs of its own."""
    files = {path.relative_to(_PAGE).as_posix(): _File(path) for path in _PAGE.rglob("*") if path.suffix in _TYPES}

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        return files["index.html"].reply(request)

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return files["docs.html"].reply(request)

    @app.get("/page/{name:path}", include_in_schema=False)
    async def part(name: str, request: Request) -> Response:
        if name not in files:
            raise HTTPException(404, f"there is no /page/{name[:100]}")
        return files[name].reply(request)

    app.mount("/swagger", StaticFiles(directory=_SWAGGER))
    app.add_middleware(_Guarded)


class _Guarded:
    """What a browser may do with what it gets here: run and load what is ours, show it in no frame, keep no figures."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: StarletteMessage) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                # Files are asked for anew, and not sent again while they are the same.
                headers["cache-control"] = "no-cache" if "etag" in headers else "no-store"
            await send(message)

        await self._app(scope, receive, send_guarded)
