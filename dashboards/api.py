"""The interface under /api/v1: typed answers, paged lists, files, and the data of every picture."""

import hashlib
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from dashboards import addresses, downloads, facts, selection
from dashboards.answers import (
    FrontAnswer,
    FullStudyAnswer,
    Refusal,
    StudyAnswer,
    TrialsAnswer,
    line,
)
from dashboards.choice import Choice
from dashboards.desk import Desk, Missing, NetworkPrice, find_trial
from dashboards.memory import Snapshot
from dashboards.trial_page import Deployment, price_of
from storage.records import TrialRecord

Segment = Annotated[str, Path(max_length=4000, description="A study's name, as `path` of its list has it.")]
Number = Annotated[int, Path(ge=0, le=2**31 - 1)]
Asked = Annotated[Choice, Query()]
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Refusal, "description": "The question makes no sense."},
    401: {"model": Refusal, "description": "There is no token, or another one."},
    404: {"model": Refusal, "description": "There is no such thing."},
    421: {"model": Refusal, "description": "The host name is not one of this dashboard's."},
    422: {"model": Refusal, "description": "A value is not of its kind."},
    503: {"model": Refusal, "description": "The database cannot be read now."},
}
UNCHANGED: dict[int | str, dict[str, Any]] = {304: {"description": "What the ETag stands for is still so."}}


class Unchanged(Exception):
    """What the asker has is what it would be given."""

    def __init__(self, etag: str) -> None:
        super().__init__(etag)
        self.etag = etag


def tag(request: Request, response: Response, *parts: object) -> None:
    """Marks an answer by what it follows from; raises Unchanged where the asker has that one."""
    told = repr((request.url.path, request.url.query, *parts)).encode(errors="surrogatepass")
    etag = f'"{hashlib.sha256(told).hexdigest()[:24]}"'
    offered = {
        part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(",")
    }
    if etag in offered:
        raise Unchanged(etag)
    response.headers["ETag"] = etag
    response.headers["Cache-Control"] = "private, no-cache"


def stamp(snapshot: Snapshot) -> tuple[object, ...]:
    """What everything that is said of a study follows from."""
    return (snapshot.study.id, snapshot.study.created_at, snapshot.version, snapshot.unread)


def router(desk: Desk) -> APIRouter:
    """The routes of studies and trials."""
    routes = APIRouter(prefix="/api/v1", tags=["studies"], responses=REFUSALS)

    @routes.get("/studies", responses=UNCHANGED)
    def studies(request: Request, response: Response) -> list[StudyAnswer]:
        """Every study of the database, in the order of making."""
        with desk.store() as store:
            found = [desk.library.snapshot(store, study) for study in store.studies()]
        tag(request, response, *(stamp(one) for one in found))
        return [_study(one) for one in found]

    @routes.get("/studies/{segment}", responses=UNCHANGED)
    def one_study(request: Request, response: Response, segment: Segment) -> FullStudyAnswer:
        """One study with its axes, configuration and hypervolume."""
        snapshot = desk.snapshot(segment)
        tag(request, response, stamp(snapshot))
        study = snapshot.study
        return FullStudyAnswer(
            study=_study(snapshot),
            axes=study.axes,
            families=study.families,
            config_hash=study.config_hash,
            config=facts.shown(study.config),
            hypervolume=snapshot.view.hypervolume,
        )

    @routes.get("/studies/{segment}/front", responses=UNCHANGED)
    def front(request: Request, response: Response, segment: Segment) -> FrontAnswer:
        """The layouts that no other beats."""
        snapshot = desk.snapshot(segment)
        tag(request, response, stamp(snapshot))
        view = snapshot.view
        return FrontAnswer(axes=view.axes, hypervolume=view.hypervolume, points=view.front)

    @routes.get("/studies/{segment}/trials", responses=UNCHANGED)
    def trials(
        request: Request,
        response: Response,
        segment: Segment,
        choice: Asked,
        offset: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> TrialsAnswer:
        """Trials in the order of number unless sorted otherwise, a page at a time."""
        snapshot = desk.snapshot(segment)
        tag(request, response, stamp(snapshot))
        numbers = chosen(snapshot, choice)
        shown = numbers[offset : offset + limit]
        view = snapshot.view
        lines = [line(view.glance(n), view.axes, n in view.on_front) for n in shown]
        return TrialsAnswer(total=len(numbers), offset=offset, trials=lines)

    @routes.get("/studies/{segment}/trials/{number}", responses=UNCHANGED)
    def one_trial(request: Request, response: Response, segment: Segment, number: Number) -> TrialRecord:
        """Everything that is kept of a trial."""
        with desk.study(segment) as (store, study):
            found = find_trial(store, study, number)
        tag(
            request,
            response,
            found.state,
            found.attempts,
            len(found.results),
            len(found.repeats),
            found.costs,
        )
        return found

    @routes.get("/studies/{segment}/trials/{number}/price")
    def price(segment: Segment, number: Number, wanted: Annotated[Deployment, Query()]) -> NetworkPrice:
        """A trial's exact costs at a context and a batch, as `nas cost` prints them, and its latency if measured there."""
        with desk.study(segment) as (store, study):
            trial = find_trial(store, study, number)
            snapshot = desk.library.snapshot(store, study)
        found = price_of(desk, snapshot, trial, *wanted.of(study))
        if found is None:
            raise Missing("This layout cannot be priced here: use nas cost.")
        return found

    @routes.get(
        "/studies/{segment}/download",
        response_class=Response,
        responses={
            200: {"content": {kind: {} for kind in downloads.MEDIA.values()}, "description": "A file."},
            501: {"model": Refusal, "description": "The format needs a library that is not installed."},
        },
    )
    def download(
        segment: Segment, choice: Asked, format: Literal["csv", "json", "parquet"] = "csv"
    ) -> Response:
        """The trials that were chosen, as a file."""
        snapshot = desk.snapshot(segment)
        view = snapshot.view
        rows = [
            downloads.flat(line(view.glance(n), view.axes, n in view.on_front))
            for n in chosen(snapshot, choice)
        ]
        name = addresses.slug(snapshot.study.name)[:80] or "study"
        headers = {"Content-Disposition": f'attachment; filename="{name}.{format}"'}
        kind = downloads.MEDIA[format]
        if format == "parquet":
            return Response(downloads.as_parquet(rows), media_type=kind, headers=headers)
        written = downloads.as_csv(rows) if format == "csv" else downloads.as_json(rows)
        return StreamingResponse(written, media_type=kind, headers=headers)

    return routes


def chosen(snapshot: Snapshot, choice: Choice) -> list[int]:
    """The trials that a choice means, by number unless it sorts otherwise."""
    try:
        numbers = selection.listed(snapshot, choice)
    except ValueError as error:
        raise HTTPException(400, str(error)) from None
    return [int(n) for n in (numbers if choice.sort else numbers[::-1])]


def _study(snapshot: Snapshot) -> StudyAnswer:
    study, plan = snapshot.study, snapshot.planned
    return StudyAnswer(
        name=study.name,
        path=addresses.api(study.name),
        state=facts.state(snapshot.counts, plan),
        planned=plan,
        counts=snapshot.counts,
        created_at=study.created_at,
        hypervolume=snapshot.view.hypervolume,
    )
