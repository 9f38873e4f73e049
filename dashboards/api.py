"""The JSON interface: plain numbers in the unit of their key, a page of trials at a time."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Path, Query
from fastapi.responses import JSONResponse, Response

from dashboards import addresses, charts, facts, strips, trial_charts
from dashboards.charts import Figure
from dashboards.compose import find_study, find_trial, measured_view
from dashboards.view import Point
from storage.records import Axis, State, StudyRecord, TrialRecord
from storage.store import Store

Segment = Annotated[str, Path(max_length=4000)]
Number = Annotated[int, Query(ge=0, le=2**31 - 1)]


@dataclass(frozen=True, kw_only=True)
class StudyAnswer:
    """A study in a list."""

    name: str
    path: str
    """Where the interface has more of it; names of any characters are quoted there."""
    state: str
    planned: int | None
    counts: Mapping[State, int]
    created_at: float


@dataclass(frozen=True, kw_only=True)
class FullStudyAnswer:
    """One study with its axes and configuration."""

    study: StudyAnswer
    axes: tuple[Axis, ...]
    families: Mapping[str, str]
    config_hash: str
    config: Mapping[str, Any]
    hypervolume: float


@dataclass(frozen=True, kw_only=True)
class FrontAnswer:
    """The front, best on the first axis first."""

    axes: tuple[Axis, ...]
    hypervolume: float
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class TrialsAnswer:
    """Some trials by number."""

    total: int
    offset: int
    trials: list[TrialRecord]


@contextmanager
def opened(url: str, segment: str) -> Iterator[tuple[Store, StudyRecord]]:
    """A store and the study that a path segment stands for; the database is open within the block alone."""
    with Store.open(url, read_only=True) as store:
        yield store, find_study(store, addresses.name_of(segment))


def router(url: str) -> APIRouter:
    """The routes under /api/v1; each opens the database for as long as it reads, and no longer."""
    routes = APIRouter(prefix="/api/v1", tags=["studies"])
    reading = partial(opened, url)

    @routes.get("/studies")
    def studies() -> list[StudyAnswer]:
        """Every study of the database, in the order of making."""
        with Store.open(url, read_only=True) as store:
            return [_study(store, study) for study in store.studies()]

    @routes.get("/studies/{segment}")
    def one_study(segment: Segment) -> FullStudyAnswer:
        """One study with its axes, configuration and hypervolume."""
        with reading(segment) as (store, study):
            return FullStudyAnswer(
                study=_study(store, study),
                axes=study.axes,
                families=study.families,
                config_hash=study.config_hash,
                config=facts.shown(study.config),
                hypervolume=measured_view(store, study).hypervolume,
            )

    @routes.get("/studies/{segment}/front")
    def front(segment: Segment) -> FrontAnswer:
        """The layouts that no other beats."""
        with reading(segment) as (store, study):
            view = measured_view(store, study)
        return FrontAnswer(axes=study.axes, hypervolume=view.hypervolume, points=view.front)

    @routes.get("/studies/{segment}/trials")
    def trials(
        segment: Segment, offset: Number = 0, limit: Annotated[int, Query(ge=1, le=1000)] = 100
    ) -> TrialsAnswer:
        """Trials by number, a page at a time."""
        with reading(segment) as (store, study):
            found = store.trials(study, offset=offset, limit=limit)
            return TrialsAnswer(total=sum(store.counts(study).values()), offset=offset, trials=found)

    @routes.get("/studies/{segment}/figure/{chart}", response_class=JSONResponse)
    def figure(
        segment: Segment, chart: str, x: str | None = None, y: str | None = None, trial: Number = 0
    ) -> Response:
        """A picture for plotly.js: front (x, y), front_3d, hypervolume, layouts; layers and curves of a trial."""
        with reading(segment) as (store, study):
            drawn = _figure(store, study, chart, x, y, trial)
        return JSONResponse(drawn)

    return routes


def _study(store: Store, study: StudyRecord) -> StudyAnswer:
    counts = store.counts(study)
    plan = facts.planned(study)
    return StudyAnswer(
        name=study.name,
        path=addresses.api(study.name),
        state=facts.state(counts, plan),
        planned=plan,
        counts=dict(counts),
        created_at=study.created_at,
    )


def _figure(
    store: Store, study: StudyRecord, chart: str, x: str | None, y: str | None, number: int
) -> Figure:
    if chart in ("layers", "curves"):
        trial = find_trial(store, study, number)
        if chart == "curves":
            return trial_charts.curves(trial)
        return trial_charts.layers(trial, study.families, strips.marks(study.families))
    view = measured_view(store, study)
    match chart:
        case "front":
            try:
                return charts.front(view, x, y)
            except ValueError as error:
                raise HTTPException(400, str(error)) from None
        case "front_3d":
            return charts.front_3d(view)
        case "hypervolume":
            return charts.hypervolume(view)
        case "layouts":
            return charts.layouts(view)
    raise HTTPException(404, "pictures are front, front_3d, hypervolume, layouts, layers and curves")
