"""The pages by address: each is read, filled and rendered, and keeps nothing open."""

from typing import Annotated

from fastapi import APIRouter, FastAPI, HTTPException, Query, Request
from fastapi.responses import HTMLResponse, Response

from dashboards import addresses, assets
from dashboards.api import Asked
from dashboards.card import card
from dashboards.compare_page import compare_page
from dashboards.desk import Desk, Missing
from dashboards.front_page import front_page
from dashboards.pages import DocsPage, render
from dashboards.studies_page import studies_page, together_page
from dashboards.tables import Column, Entry, Row, Table
from dashboards.trial_page import Deployment, trial_page
from dashboards.why_page import why_page

OPENAPI = "/api/v1/openapi.json"


def router(desk: Desk) -> APIRouter:
    """The pages of one database."""
    routes = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)

    @routes.get("/")
    def studies() -> str:
        return render(studies_page(desk))

    @routes.get("/together")
    def together(study: Annotated[list[str], Query()], x: str | None = None, y: str | None = None) -> str:
        try:
            return render(together_page(desk, study, x, y))
        except ValueError as error:
            raise HTTPException(400, str(error)) from None

    @routes.get("/studies/{segment}")
    def front(segment: str, choice: Asked) -> str:
        try:
            return render(front_page(desk, segment, choice))
        except ValueError as error:
            raise HTTPException(400, str(error)) from None

    @routes.get("/studies/{segment}/compare")
    def compare(segment: str, choice: Asked) -> str:
        return render(compare_page(desk, segment, choice))

    @routes.get("/studies/{segment}/why")
    def why(segment: str) -> str:
        return render(why_page(desk, segment))

    @routes.get("/studies/{segment}/trials/{number}")
    def trial(segment: str, number: str, wanted: Annotated[Deployment, Query()]) -> str:
        return render(trial_page(desk, segment, _number(number), wanted))

    @routes.get("/studies/{segment}/trials/{number}/card")
    def small(segment: str, number: str) -> str:
        return render(card(desk, segment, _number(number)))

    return routes


def _number(text: str) -> int:
    # Only what could be a number is looked up: everything else is simply no trial.
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise Missing(f"There is no trial “{text}”: trials are numbered from 0.")
    return int(text)


def add_static(app: FastAPI) -> None:
    """The files of the pages, and the page that lists the interface's routes."""

    @app.get("/static/{name}", include_in_schema=False)
    def static(request: Request, name: str) -> Response:
        asset = assets.served().get(name)
        if asset is None:
            raise HTTPException(404, "There is no such file.")
        # An address that names the content may be kept for good: another content has another address.
        kept = request.query_params.get("v") == asset.version
        control = "private, max-age=31536000, immutable" if kept else "private, no-cache"
        headers = {"ETag": asset.etag, "Cache-Control": control}
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
        table = Table(caption="Routes", columns=columns, rows=tuple(rows))
        return render(DocsPage(routes=table, openapi=addresses.root() + OPENAPI))
