"""The data of every picture, by name, under /api/v1: the same figures that the report holds."""

import json
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request, Response

from dashboards import (
    compare_charts,
    compare_page,
    front_page,
    growth_chart,
    strips,
    studies_page,
    trial_charts,
    trial_tables,
    why_page,
)
from dashboards.answers import FigureAnswer
from dashboards.api import REFUSALS, UNCHANGED, Asked, Segment, stamp, tag
from dashboards.charts import Figure, layouts
from dashboards.choice import Choice
from dashboards.desk import Desk, Missing, find_trial
from dashboards.memory import Snapshot
from dashboards.quantities import tokens
from dashboards.scene import MANY
from dashboards.still import still
from dashboards.trial_page import Deployment, price_of
from dashboards.why import why

OF_STUDY = ("front", "front_3d", "layouts", "hypervolume", "calibration", "contexts", "latencies", "tasks")
SVG = "image/svg+xml"
OF_TRIAL = ("layers", "curves", "scores")
Since = Annotated[int, Query(ge=0, le=2**62, description="An earlier `version`: the crowd since then alone.")]


def router(desk: Desk) -> APIRouter:
    """The routes of pictures."""
    routes = APIRouter(prefix="/api/v1", tags=["pictures"], responses=REFUSALS | UNCHANGED)

    @routes.get("/studies/{segment}/figure/{chart}", response_model=FigureAnswer)
    def figure(
        request: Request,
        response: Response,
        segment: Segment,
        chart: str,
        choice: Asked,
        deployment: Annotated[Deployment, Query()],
        trial: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0,
        narrow: bool = False,
        since: Since = 0,
    ) -> Response:
        """front, front_3d, layouts, hypervolume, calibration, contexts, latencies, tasks, why_…; layers, curves, scores of a trial."""
        snapshot = desk.snapshot(segment)
        tag(request, response, stamp(snapshot), since)
        # With a lasso the crowd has an order, which new trials at its end would break.
        grows = since and chart == "front" and not choice.area
        fresh = _since(desk, snapshot, since) if grows else None
        if chart in OF_TRIAL:
            drawn = _of_trial(desk, snapshot, chart, trial, deployment)
        else:
            try:
                drawn = _of_study(desk, snapshot, chart, choice, narrow, fresh)
            except ValueError as error:
                raise HTTPException(400, str(error)) from None
        return _sent(drawn | {"version": snapshot.version, "increment": fresh is not None}, response)

    @routes.get(
        "/studies/{segment}/front.svg",
        response_class=Response,
        responses={200: {"content": {SVG: {}}, "description": "A picture."}},
    )
    def front_still(
        request: Request, response: Response, segment: Segment, choice: Asked, narrow: bool = False
    ) -> Response:
        """The front of two objectives as a still picture: what the page shows until its own is drawn."""
        snapshot = desk.snapshot(segment)
        tag(request, response, stamp(snapshot))
        plane = choice.model_copy(update={"view": "plane"})
        try:
            drawn = front_page.picture(desk, snapshot, plane, narrow=narrow)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        return Response(still(drawn, narrow=narrow), media_type=SVG, headers=dict(response.headers))

    @routes.get("/together", response_model=FigureAnswer)
    def together(
        request: Request,
        response: Response,
        study: Annotated[list[str], Query(max_length=studies_page.MOST)],
        x: str | None = None,
        y: str | None = None,
    ) -> Response:
        """The fronts of several studies in one picture."""
        try:
            found = studies_page.together(desk, study)
            tag(request, response, *(stamp(one) for one in found))
            drawn = studies_page.laid_over(found, x, y)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        return _sent(drawn | {"version": max(one.version for one in found), "increment": False}, response)

    return routes


def _of_trial(desk: Desk, snapshot: Snapshot, chart: str, number: int, deployment: Deployment) -> Figure:
    with desk.store() as store:
        trial = find_trial(store, snapshot.study, number)
    view, study = snapshot.view, snapshot.study
    if chart == "curves":
        return trial_charts.curves(trial)
    if chart == "scores":
        known = trial_tables.known_scores(snapshot, trial)
        quality = {n: value for _, n, _ in known if (value := view.glance(n).value("quality")) is not None}
        return trial_charts.scores(trial, known, quality)
    asked, searched = deployment.of(study), Deployment().of(study)
    price = price_of(desk, snapshot, trial, *asked)
    context, batch = searched if price is None or price.latency is None else asked
    measured_at = f"{tokens(context)}, batch {batch}" if price is not None else ""
    return trial_charts.layers(trial, study.families, strips.marks(study.families), price, measured_at)


def _of_study(
    desk: Desk, snapshot: Snapshot, chart: str, choice: Choice, narrow: bool, fresh: frozenset[int] | None
) -> Figure:
    match chart:
        case "front":
            return front_page.picture(desk, snapshot, choice, narrow=narrow, fresh=fresh)
        case "front_3d":
            space = choice.model_copy(update={"view": "space"})
            return front_page.picture(desk, snapshot, space, narrow=narrow)
        case "layouts":
            return layouts(snapshot.view)
        case "hypervolume":
            with desk.store() as store:
                others = why_page.random_studies(desk, store, snapshot.study)
            return growth_chart.hypervolume(snapshot.view, desk.luck(snapshot), others)
        case "calibration":
            return why_page.calibration(snapshot)
        case "contexts" | "latencies" | "tasks":
            picked = compare_page.seen_of(snapshot, choice)
            if chart == "tasks":
                return compare_charts.tasks(picked)
            prices = compare_page.prices_of(desk, snapshot, picked)
            if len(prices) < len(picked):
                raise ValueError("These layouts cannot be priced here: use nas cost.")
            drawn = compare_charts.latencies if chart == "latencies" else compare_charts.contexts
            return drawn(picked, prices)
        case str() if chart.startswith("why_"):
            found = why_page.reasons_of(desk, snapshot)
            section = None if isinstance(found, str) else why(found, snapshot.study.families)
            for one in section.pictures if section else ():
                if one.key == chart:
                    return one.figure
    names = ", ".join((*OF_STUDY, *OF_TRIAL))
    raise Missing(f"There is no such picture now; there are {names}, and why_… once the reasons are known.")


def _since(desk: Desk, snapshot: Snapshot, since: int) -> frozenset[int] | None:
    """What changed after an event, where that is less than the whole crowd; else None."""
    if len(snapshot.view.measured) <= MANY or since > snapshot.version:
        return None
    with desk.store() as store:
        _, changed = store.changed_trials(snapshot.study, since)
    return frozenset(changed) if len(changed) <= MANY else None


def _sent(drawn: Figure, response: Response) -> Response:
    text = json.dumps(drawn, allow_nan=False, separators=(",", ":"))
    return Response(text, media_type="application/json", headers=dict(response.headers))
