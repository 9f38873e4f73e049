"""The dashboard's server: read-only pages and a JSON interface behind a token."""

import threading
from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated
from urllib.parse import parse_qs

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.exceptions import HTTPException as RoutingException

from dashboards import addresses, api, assets, compose, metrics, stream
from dashboards.compose import Missing
from dashboards.door import MISSING_TOKEN, Door, Keeper, login_form, refuse
from dashboards.pages import DocsPage, MessagePage, render
from dashboards.tables import Column, Entry, Row, Table
from storage.errors import StorageError
from storage.store import Store

WRONG_TOKEN = "That token is not the right one. `nas dashboard` printed the right one when it started."
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
OPENAPI = "/api/v1/openapi.json"
FORM_BYTES = 4096


def create_app(url: str, *, token: str, allowed_hosts: Sequence[str] = LOOPBACK) -> FastAPI:
    """The dashboard of one database, for any ASGI server; ValueError for an empty token."""
    keeper = Keeper(token)
    closing = threading.Event()
    app = FastAPI(title="nas dashboard", version="1", docs_url=None, redoc_url=None, openapi_url=OPENAPI)
    app.add_middleware(Door, keeper=keeper, allowed_hosts=tuple(allowed_hosts))
    app.include_router(api.router(url))
    app.include_router(stream.router(url, closing))
    app.include_router(metrics.router(url))
    # A server sets this when it begins to stop; streams then end by themselves, and nothing has to be cancelled.
    app.state.closing = closing
    _add_entrance(app, keeper)
    _add_pages(app, url)
    _add_refusals(app)
    return app


def _add_entrance(app: FastAPI, keeper: Keeper) -> None:
    def let_in(request: Request, offered: str) -> Response:
        if not keeper.knows_token(offered):
            return refuse(request, 401, WRONG_TOKEN)
        answer = RedirectResponse("/", 303)
        answer.set_cookie(keeper.cookie_name, keeper.cookie_value, httponly=True, samesite="strict", path="/")
        return answer

    @app.get("/health")
    def health() -> dict[str, str]:
        """Says that the server runs; open to everybody, so it says nothing else."""
        return {"status": "ok"}

    @app.get("/login", include_in_schema=False)
    def login(request: Request, token: str | None = None) -> Response:
        return HTMLResponse(login_form(MISSING_TOKEN)) if token is None else let_in(request, token)

    @app.post("/login", include_in_schema=False)
    async def login_by_form(request: Request) -> Response:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > FORM_BYTES:
                return refuse(request, 413, "A token is shorter than that.")
        form = parse_qs(body.decode(errors="replace"))
        return let_in(request, form.get("token", [""])[0].strip())


def _add_pages(app: FastAPI, url: str) -> None:
    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def studies() -> str:
        with Store.open(url, read_only=True) as store:
            page = compose.studies_page(store)
        return render(page)

    @app.get("/studies/{segment}", response_class=HTMLResponse, include_in_schema=False)
    def front(
        segment: str,
        x: str | None = None,
        y: str | None = None,
        page: Annotated[int, Query(ge=1, le=10**6)] = 1,
    ) -> str:
        try:
            with Store.open(url, read_only=True) as store:
                shown = compose.front_page(store, addresses.name_of(segment), x=x, y=y, page=page)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        return render(shown)

    @app.get("/studies/{segment}/trials/{number}", response_class=HTMLResponse, include_in_schema=False)
    def trial(segment: str, number: str) -> str:
        # Only what could be a number is looked up: everything else is simply no trial.
        if not (number.isascii() and number.isdigit() and len(number) < 10):
            raise Missing(f"There is no trial “{number}”: trials are numbered from 0.")
        with Store.open(url, read_only=True) as store:
            page = compose.trial_page(store, addresses.name_of(segment), int(number))
        return render(page)

    @app.get("/static/{name}", include_in_schema=False)
    def static(request: Request, name: str) -> Response:
        asset = assets.served().get(name)
        if asset is None:
            raise HTTPException(404, "There is no such file.")
        headers = {"ETag": asset.etag, "Cache-Control": "private, no-cache"}
        if request.headers.get("if-none-match") == asset.etag:
            return Response(status_code=304, headers=headers)
        return Response(asset.body, media_type=asset.media_type, headers=headers)

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    def docs() -> str:
        columns = (Column(title="address"), Column(title="what it answers"))
        rows = []
        for path, methods in app.openapi()["paths"].items():
            for method, route in methods.items():
                entries = (Entry(text=f"{method.upper()} {path}"), Entry(text=route.get("description", "")))
                rows.append(Row(entries=entries))
        return render(
            DocsPage(routes=Table(caption="Routes", columns=columns, rows=tuple(rows)), openapi=OPENAPI)
        )


def _add_refusals(app: FastAPI) -> None:
    def answer(request: Request, status: int, page: MessagePage) -> Response:
        if request.url.path.startswith(("/api/", "/static/", metrics.PATH)) or status == 405:
            return JSONResponse({"detail": page.line}, status)
        return HTMLResponse(render(page), status)

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
