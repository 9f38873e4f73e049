"""A study in numbers. Asked again, only what has happened since is read, so that a hundred thousand trials cost nothing.

A reader holds up a SQLite file's writer for as long as it reads: the first reading is cut into many short ones.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, func, select

from storage.events import read_events
from storage.records import Axis, State, StudyRecord
from storage.tables import EventRow, RepeatRow, ResultRow, TrialRow, epoch_now
from storage.trials import count_numbers, count_states

PORTION = 2000
"""Trials or events that are read in one transaction."""
BRINGS_RESULTS = ("trial_done", "trial_pruned", "trial_repeated")
STARTED, REQUEUED, TOO_LATE = "trial_running", "trial_requeued", "late_result_rejected"

Reading = Callable[[], AbstractContextManager[Connection]]


class Work(NamedTuple):
    """What trainings took in all."""

    results: int
    repeats: int
    """Results of further seeds, which are not among those above; what follows is of both."""
    steps: int
    tokens: int
    train_s: float
    worker_s: float


class Told(NamedTuple):
    """What one trial adds: its work, and its values on the study's axes if it is done and has them all."""

    work: Work
    values: tuple[float, ...] | None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How a study stands."""

    trials: Mapping[State, int]
    events: Mapping[str, int]
    """How many happened, by kind."""
    last_event: int
    """The number of the newest event that is counted here."""
    last_event_at: float | None
    now: float
    """When this was read, by the database's clock, as is the time of the last event."""
    told: Mapping[int, Told]
    """By trial number, of those that have a result."""

    @property
    def attempts(self) -> int:
        """How often a trial was started."""
        return self.events.get(STARTED, 0)

    @property
    def requeues(self) -> int:
        """How often one was put back."""
        return self.events.get(REQUEUED, 0)

    @property
    def late_results(self) -> int:
        """Results that came after their attempt had been given up."""
        return self.events.get(TOO_LATE, 0)

    @property
    def work(self) -> Work:
        """The work of all trials."""
        return _sum(one.work for one in self.told.values())

    @property
    def points(self) -> list[tuple[float, ...]]:
        """The raw values of all trials that have them, in the order of the axes."""
        return [one.values for one in self.told.values() if one.values is not None]


def refresh(
    reading: Reading, study: StudyRecord, known: Summary | None, *, has_repeats: Callable[[Connection], bool]
) -> Summary:
    """The summary of a study now; with an earlier one only the trials that got a result since are read."""
    with reading() as connection:
        newest = _last_event(connection, study)
    # A database that was replaced by another one counts from the beginning again.
    if known is None or known.last_event > newest:
        known = _first(reading, study, has_repeats)
    counts, told = Counter(known.events), dict(known.told)
    last, last_at = known.last_event, known.last_event_at
    while True:
        with reading() as connection:
            found = read_events(connection, study.id, last, PORTION)
            ended = sorted({event.payload["trial"] for event in found if event.kind in BRINGS_RESULTS})
            wanted = TrialRow.number.in_(ended)
            told |= told_of(connection, study, wanted, has_repeats(connection)) if ended else {}
            counts.update(event.kind for event in found)
            if found:
                last, last_at = found[-1].seq, found[-1].at
            if len(found) < PORTION:
                return Summary(
                    trials=count_states(connection, study),
                    events=dict(sorted(counts.items())),
                    last_event=last,
                    last_event_at=last_at,
                    now=connection.execute(select(epoch_now())).scalar_one(),
                    told=told,
                )


def _first(reading: Reading, study: StudyRecord, has_repeats: Callable[[Connection], bool]) -> Summary:
    """All that is there. What ends while it is read is read again, as its event comes after those counted here."""
    with reading() as connection:
        last = _last_event(connection, study)
        last_at = connection.execute(select(EventRow.at).where(EventRow.seq == last)).scalar()
        count = count_numbers(connection, study)
        first = select(func.min(EventRow.seq)).where(EventRow.study_id == study.id)
        begin = connection.execute(first).scalar() or 0
    events: Counter[str] = Counter()
    for numbers in _portions(begin, last + 1, 10 * PORTION):
        with reading() as connection:
            events.update(_count_events(connection, study, numbers))
    told: dict[int, Told] = {}
    for numbers in _portions(0, count, PORTION):
        wanted = TrialRow.number.between(numbers[0], numbers[-1])
        with reading() as connection:
            told |= told_of(connection, study, wanted, has_repeats(connection))
    return Summary(trials={}, events=events, last_event=last, last_event_at=last_at, now=0.0, told=told)


def _last_event(connection: Connection, study: StudyRecord) -> int:
    newest = select(func.max(EventRow.seq)).where(EventRow.study_id == study.id)
    return connection.execute(newest).scalar() or 0


def _portions(first: int, end: int, size: int) -> Iterator[range]:
    for start in range(first, end, size):
        yield range(start, min(start + size, end))


def _count_events(connection: Connection, study: StudyRecord, numbers: range) -> dict[str, int]:
    counted = connection.execute(
        select(EventRow.kind, func.count())
        .where(EventRow.study_id == study.id, EventRow.seq.between(numbers[0], numbers[-1]))
        .group_by(EventRow.kind)
    )
    return {kind: count for kind, count in counted}  # noqa: C416 - a Row is not typed as a pair


def told_of(
    connection: Connection, study: StudyRecord, wanted: ColumnElement[bool], repeats: bool
) -> dict[int, Told]:
    """What those trials among the wanted ones that have a result add, in two or three queries."""
    mine = (TrialRow.study_id == study.id, wanted)
    costs = [TrialRow.costs[axis.name].as_float() for axis in study.axes]
    trials = connection.execute(
        select(TrialRow.id, TrialRow.number, TrialRow.state, *costs).where(*mine)
    ).all()
    ids = select(TrialRow.id).where(*mine)
    results = _by_trial(connection, ResultRow, study.axes, ids, ResultRow.rung)
    again = _by_trial(connection, RepeatRow, study.axes, ids, RepeatRow.seed) if repeats else {}
    told = {}
    for key, number, state, *of_layout in trials:
        own, seeds = results.get(key, []), again.get(key, [])
        if own:
            works = [Work(1, 0, *row[1:5]) for row in own] + [Work(0, 1, *row[1:5]) for row in seeds]
            values = _values(study.axes, of_layout, [own[-1], *seeds]) if state == "done" else None
            told[number] = Told(works[0] if len(works) == 1 else _sum(works), values)
    return told


def _by_trial(
    connection: Connection, table: Any, axes: Iterable[Axis], ids: Any, order: Any
) -> dict[int, list[Sequence[Any]]]:
    """By trial, in order: the quality, what it took (four numbers), and the scores under the names of the axes."""
    scores = [table.scores[axis.name].as_float() for axis in axes]
    numbers = (table.quality, table.steps, table.tokens, table.train_s, table.worker_s)
    wanted = select(table.trial_id, *numbers, *scores).where(table.trial_id.in_(ids))
    rows: dict[int, list[Sequence[Any]]] = {}
    for key, *row in connection.execute(wanted.order_by(table.trial_id, order)).all():
        rows.setdefault(key, []).append(row)
    return rows


def _values(
    axes: Sequence[Axis], costs: Sequence[float | None], seeds: Sequence[Sequence[Any]]
) -> tuple[float, ...] | None:
    """As `TrialRecord.value` has it: a cost of the layout, or the mean over those seeds that have a score."""
    values = []
    for place, axis in enumerate(axes):
        cost = costs[place]
        if cost is not None and axis.name != "quality":
            values.append(float(cost))
            continue
        column = 0 if axis.name == "quality" else 5 + place
        there = [row[column] for row in seeds if row[column] is not None]
        if not there:
            return None
        values.append(sum(there) / len(there))
    return tuple(values)


def _sum(works: Iterable[Work]) -> Work:
    # One after the other: a sum of the same things in the same order never falls when one of them rises.
    results = repeats = steps = tokens = 0
    train_s = worker_s = 0.0
    for work in works:
        results += work[0]
        repeats += work[1]
        steps += work[2]
        tokens += work[3]
        train_s += work[4]
        worker_s += work[5]
    return Work(results, repeats, steps, tokens, train_s, worker_s)
