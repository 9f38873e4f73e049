"""The dashboard's server: read-only pages and a JSON interface behind a token."""

import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException as RoutingException

from dashboards import api, figures, metrics, routes, stream
from dashboards.api import Unchanged
from dashboards.desk import Desk, Missing, Workshop
from dashboards.door import MISSING_TOKEN, Door, Keeper, let_in, login_form, refuse
from dashboards.downloads import Unsupported
from dashboards.memory import Library
from dashboards.pages import MessagePage, render
from storage.errors import StorageError

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
FORM_BYTES = 4096


def create_app(
    url: str,
    *,
    token: str,
    allowed_hosts: Sequence[str] = LOOPBACK,
    workshop: Workshop | None = None,
    root_path: str = "",
) -> FastAPI:
    """The dashboard of one database, for any ASGI server; ValueError for an empty token or a root that is no path."""
    if root_path and not (root_path.startswith("/") and not root_path.endswith("/")):
        raise ValueError(f"the root path is {root_path!r}: write it like /nas")
    keeper = Keeper(token)
    closing = threading.Event()
    desk = Desk(url=url, library=Library(url), workshop=workshop)

    @asynccontextmanager
    async def living(_app: FastAPI) -> AsyncIterator[None]:
        yield
        closing.set()

    app = FastAPI(
        title="nas dashboard",
        version="1",
        docs_url=None,
        redoc_url=None,
        openapi_url=routes.OPENAPI,
        lifespan=living,
        # Every address is known by itself: one with a slash too many is simply not there.
        redirect_slashes=False,
    )
    app.add_middleware(Door, keeper=keeper, allowed_hosts=tuple(allowed_hosts), root=root_path)
    app.include_router(api.router(desk))
    app.include_router(figures.router(desk))
    app.include_router(stream.router(desk, closing))
    app.include_router(metrics.router(url))
    # A server sets this when it begins to stop; streams then end by themselves, and nothing has to be cancelled.
    app.state.closing = closing
    _add_entrance(app, keeper)
    app.include_router(routes.router(desk))
    routes.add_static(app)
    _add_refusals(app)
    return app


def _add_entrance(app: FastAPI, keeper: Keeper) -> None:
    @app.get("/health")
    def health() -> dict[str, str]:
        """Says that the server runs; open to everybody, so it says nothing else."""
        return {"status": "ok"}

    @app.get("/login", include_in_schema=False)
    def login(request: Request, token: str | None = None) -> Response:
        return HTMLResponse(login_form(MISSING_TOKEN)) if token is None else let_in(request, keeper, token)

    @app.post("/login", include_in_schema=False)
    async def login_by_form(request: Request) -> Response:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > FORM_BYTES:
                return refuse(request, 413, "A token is shorter than that.")
        form = parse_qs(body.decode(errors="replace"))
        return let_in(request, keeper, form.get("token", [""])[0].strip())


def _add_refusals(app: FastAPI) -> None:
    def answer(request: Request, status: int, page: MessagePage) -> Response:
        if request.url.path.startswith(("/api/", "/static/", metrics.PATH)) or status == 405:
            return JSONResponse({"detail": page.line}, status)
        return HTMLResponse(render(page), status)

    @app.exception_handler(Unchanged)
    async def unchanged(_request: Request, same: Unchanged) -> Response:
        return Response(status_code=304, headers={"ETag": same.etag, "Cache-Control": "private, no-cache"})

    @app.exception_handler(Unsupported)
    async def unsupported(_request: Request, error: Unsupported) -> Response:
        return JSONResponse({"detail": str(error)}, 501)

    @app.exception_handler(Missing)
    async def missing(request: Request, error: Missing) -> Response:
        return answer(request, 404, MessagePage(heading="Not here", line=str(error)))

    @app.exception_handler(StorageError)
    async def unreadable(request: Request, error: StorageError) -> Response:
        page = MessagePage(
            heading="The database cannot be read",
            line=str(error),
            back=request.url.path,
            back_words="Try again",
        )
        return answer(request, 503, page)

    @app.exception_handler(RequestValidationError)
    async def misasked(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        line = f"{'.'.join(str(part) for part in first['loc'][1:])}: {first['msg']}"
        return answer(request, 422, MessagePage(heading="That address makes no sense", line=line))

    @app.exception_handler(RoutingException)
    async def unrouted(request: Request, error: RoutingException) -> Response:
        line = (
            "There is no page at this address."
            if error.status_code == 404
            else HTTPStatus(error.status_code).phrase
        )
        told = line if error.detail == HTTPStatus(error.status_code).phrase else error.detail
        heading = "Not here" if error.status_code == 404 else "That cannot be shown"
        response = answer(request, error.status_code, MessagePage(heading=heading, line=told))
        response.headers.update(error.headers or {})
        return response
