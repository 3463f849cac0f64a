"""The page at `/`, and the page of the API at /docs: files of ours and of packages, nothing from another host."""

from pathlib import Path

import fastapi_offline
from fastapi import FastAPI
from fastapi.responses import FileResponse
from starlette.datastructures import MutableHeaders
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as StarletteMessage

_PAGE = Path(__file__).parent / "page"
# Of fastapi-offline only its copy of Swagger UI: the page that it makes has a script within, which our policy forbids.
_SWAGGER = Path(fastapi_offline.__file__).parent / "static"
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


def add_pages(app: FastAPI) -> None:
    """`app` must not serve docs of its own."""

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(_PAGE / "docs.html")

    app.mount("/page", StaticFiles(directory=_PAGE))
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
