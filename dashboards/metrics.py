"""The studies of a database as metrics that Prometheus scrapes, counted from the tables and from nothing else."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from storage import pareto
from storage.records import StudyRecord
from storage.store import Store
from storage.summary import Summary, Work

PATH = "/metrics"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How one study stands: what was counted, and what its done trials amount to."""

    study: str
    summary: Summary
    work: Work
    front: int
    """Layouts that no other beats."""
    hypervolume: float


def standing(study: StudyRecord, summary: Summary) -> Standing:
    """The standing that follows from a study's axes and its summary."""
    points = summary.points
    if not points:
        return Standing(study=study.name, summary=summary, work=summary.work, front=0, hypervolume=0.0)
    directed = [
        [-value if axis.maximise else value for axis, value in zip(study.axes, point, strict=True)]
        for point in points
    ]
    front = pareto.front(directed)
    losses = pareto.losses(study.axes, [points[index] for index in front])
    return Standing(
        study=study.name,
        summary=summary,
        work=summary.work,
        # A layout that came to the same values twice stands once, as on the pages.
        front=len({points[index] for index in front}),
        hypervolume=pareto.hypervolume(losses),
    )


def exposition(standings: Sequence[Standing], *, schema_version: int, read_s: float) -> str:
    """The text of a scrape, in Prometheus's text format 0.0.4."""
    return generate_latest(_Families(standings, schema_version, read_s)).decode("utf-8")


COUNTERS: tuple[tuple[str, str, Callable[[Summary, Work], float]], ...] = (
    ("attempts", "Attempts at trials that were started.", lambda summary, _: summary.attempts),
    ("requeues", "Attempts that ended with the trial put back.", lambda summary, _: summary.requeues),
    (
        "late_results_rejected",
        "Results that came too late to count.",
        lambda summary, _: summary.late_results,
    ),
    ("results", "Results stored, one for each rung that a trial reached.", lambda _, work: work.results),
    ("repeats", "Results stored of further seeds.", lambda _, work: work.repeats),
    ("steps", "Training steps of all results.", lambda _, work: work.steps),
    ("tokens", "Tokens trained on, of all results.", lambda _, work: work.tokens),
    ("train_seconds", "Time inside training loops, of all results.", lambda _, work: work.train_s),
    ("worker_seconds", "Time of workers, of all results.", lambda _, work: work.worker_s),
)
"""Each with its name (without nas_ and _total), what it says, and where it comes from."""


class _Families(Collector):
    """What the library asks for its metrics."""

    def __init__(self, standings: Sequence[Standing], schema_version: int, read_s: float) -> None:
        self._standings, self._schema_version, self._read_s = standings, schema_version, read_s

    def collect(self) -> Iterator[Metric]:
        """Every family, whether there are studies or not, so that a scrape tells what it could hold."""
        yield GaugeMetricFamily(
            "nas_schema_version", "Version of the database's tables.", value=self._schema_version
        )
        yield GaugeMetricFamily("nas_studies", "Studies in the database.", value=len(self._standings))
        yield GaugeMetricFamily(
            "nas_metrics_read_seconds", "Time that reading these numbers took.", value=self._read_s
        )
        trials = GaugeMetricFamily("nas_trials", "Trials by state.", labels=["study", "state"])
        events = CounterMetricFamily("nas_events", "Events by kind.", labels=["study", "kind"])
        for one in self._standings:
            for state, count in one.summary.trials.items():
                trials.add_metric([one.study, state], count)
            for kind, count in one.summary.events.items():
                events.add_metric([one.study, kind], count)
        yield from (trials, events)
        yield from self._counters()
        yield from self._gauges()

    def _counters(self) -> Iterator[Metric]:
        for name, words, number in COUNTERS:
            family = CounterMetricFamily(f"nas_{name}", words, labels=["study"])
            for one in self._standings:
                family.add_metric([one.study], number(one.summary, one.work))
            yield family

    def _gauges(self) -> Iterator[Metric]:
        volume = GaugeMetricFamily(
            "nas_hypervolume", "Share of the box of objectives that is beaten.", labels=["study"]
        )
        front = GaugeMetricFamily("nas_front_layouts", "Layouts that no other beats.", labels=["study"])
        at = GaugeMetricFamily(
            "nas_last_event_timestamp_seconds", "When the last event happened.", labels=["study"]
        )
        age = GaugeMetricFamily(
            "nas_last_event_age_seconds", "How long ago that was, by the database's clock.", labels=["study"]
        )
        for one in self._standings:
            volume.add_metric([one.study], one.hypervolume)
            front.add_metric([one.study], one.front)
            if one.summary.last_event_at is not None:
                at.add_metric([one.study], one.summary.last_event_at)
                age.add_metric([one.study], max(0.0, one.summary.now - one.summary.last_event_at))
        yield from (volume, front, at, age)


class Reader:
    """Reads the metrics of one database. What it remembers of a study is read once, and a scrape reads what came since."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._known: dict[tuple[str, float], Standing] = {}
        # One scrape at a time: the first of a large study takes seconds, and need not be done twice.
        self._turn = threading.Lock()

    def read(self) -> str:
        """The text of a scrape; StorageError where the database cannot be read."""
        with self._turn:
            began = time.perf_counter()
            with Store.open(self._url, read_only=True) as store:
                version, studies = store.schema_version(), store.studies()
                # A database that was replaced under its name has another time of making.
                now = {(study.name, study.created_at): self._standing(store, study) for study in studies}
            self._known = now
            return exposition(list(now.values()), schema_version=version, read_s=time.perf_counter() - began)

    def _standing(self, store: Store, study: StudyRecord) -> Standing:
        before = self._known.get((study.name, study.created_at))
        summary = store.summary(study, None if before is None else before.summary)
        if before is not None and before.summary.last_event == summary.last_event:
            return replace(before, summary=summary)
        return standing(study, summary)


def router(url: str) -> APIRouter:
    """The route of one database's metrics."""
    routes = APIRouter(tags=["metrics"])
    reader = Reader(url)

    @routes.get(PATH, response_class=Response)
    def metrics() -> Response:
        """Every study in numbers, in Prometheus's text format."""
        return Response(reader.read(), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    return routes
