"""What the server remembers of each study, so that a page of a hundred thousand trials reads only what is new."""

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dashboards.view import StudyView, values_of, view_of
from storage.errors import StorageError
from storage.events import PLANNED
from storage.glances import Glance, Layers
from storage.records import STATES, State, StudyRecord
from storage.store import Store

AT_ONCE = 4000
"""So many trials are read while a page waits; more are read beside it, and the page says how far that is."""
PORTION = 2000


@dataclass(frozen=True)
class Columns:
    """[T] by trial: what lists are filtered by, as places in lists of what occurs."""

    mixers: NDArray[np.int32]
    origins: NDArray[np.int32]
    states: NDArray[np.int8]
    """Places in STATES, -1 where a trial was not read yet."""
    rungs: NDArray[np.int16]
    """The highest rung that each trial reached, -1 where none."""
    repeated: frozenset[int]
    """Numbers of the trials with further seeds."""

    def grown(self, count: int) -> "Columns":
        """Copies with so many more trials, of which nothing is known."""
        return Columns(
            mixers=np.pad(self.mixers, (0, count)),
            origins=np.pad(self.origins, (0, count)),
            states=np.pad(self.states, (0, count), constant_values=-1),
            rungs=np.pad(self.rungs, (0, count), constant_values=-1),
            repeated=self.repeated,
        )


NO_COLUMNS = Columns(
    np.empty(0, dtype=np.int32),
    np.empty(0, dtype=np.int32),
    np.empty(0, dtype=np.int8),
    np.empty(0, dtype=np.int16),
    frozenset(),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """One study as it stood at one moment; whoever holds it sees no later change."""

    study: StudyRecord
    version: int
    """The number of the study's last event that is in here."""
    view: StudyView
    counts: Mapping[State, int]
    columns: Columns
    mixer_sets: Sequence[frozenset[str]]
    origins: Sequence[str]
    neighbours: Mapping[tuple[int, ...], Sequence[int]]
    """Numbers of trials by their layers, each as a place among `layers`."""
    layer_kinds: Sequence[Mapping[str, Any]]
    planned: int | None = None
    """How many trials the last search of it was to make; None where none said."""
    device: str = ""
    """Where its latencies were last measured; empty where none said."""
    unread: int = 0
    """Trials that are there and not read yet."""

    @property
    def total(self) -> int:
        """How many trials there are."""
        return sum(self.counts.values()) + self.unread

    @cached_property
    def mixers_present(self) -> frozenset[str]:
        """Every mixer that some layout holds."""
        return frozenset().union(*self.mixer_sets)

    @property
    def numbers(self) -> NDArray[np.intp]:
        """Every trial that was read, in order."""
        return np.flatnonzero(self.columns.states >= 0)

    @property
    def repeated(self) -> tuple[Glance, ...]:
        """Trials that were trained with further seeds."""
        return tuple(self.view.glance(number) for number in sorted(self.columns.repeated))

    @property
    def running(self) -> tuple[Glance, ...]:
        """Trials that are being trained."""
        now = np.flatnonzero(self.columns.states == STATES.index("running"))
        return tuple(self.view.glance(int(number)) for number in now)


class Memory:
    """One study, read once and kept current by its events. Use it from several threads as you like."""

    def __init__(self, url: str, study: StudyRecord) -> None:
        self._url, self._study = url, study
        self._lock = threading.Lock()
        self._glances: list[Glance | None] = []
        self._values = np.empty((0, len(study.axes)))
        self._columns = NO_COLUMNS
        self._origins: dict[str, int] = {}
        self._sets: dict[frozenset[str], int] = {}
        self._read: Layers = {}
        self._kinds: dict[int, int] = {}
        self._layers: list[Mapping[str, Any]] = []
        self._by_layers: dict[tuple[int, ...], list[int]] = {}
        self._counts: Counter[State] = Counter()
        self._known: Snapshot | None = None
        self._version: int | None = None
        self._planned: int | None = None
        self._device = ""
        self._asked = 0
        self._reading: threading.Thread | None = None

    def snapshot(self, store: Store) -> Snapshot:
        """The study as it stands now, or as far as it has been read where it is large."""
        with self._lock:
            begun = self._version is not None
            last, changed = store.changed_trials(self._study, self._version)
            if last > self._asked:
                for event in store.last_events(self._study, {PLANNED}, self._asked, 1):
                    self._planned = _planned_in(event.payload)
                    self._device = str(event.payload.get("device") or "")
                self._asked = last
            if not begun:
                changed = list(range(_count(store, self._study)))
            unread = 0
            if self._reading is not None and not self._reading.is_alive():
                self._reading = None
            if self._reading is not None or len(changed) > AT_ONCE:
                unread = len(changed)
                if self._reading is None:
                    self._read_aside(last, changed)
                elif self._known is not None and self._known.unread:
                    unread = self._known.unread
            elif changed or last != self._version or self._known is None:
                self._take(store.glances(self._study, _compact(changed), self._read))
                self._version = last
                self._known = self._made(last)
            if self._known is None:
                self._known = self._made(0)
            return replace(self._known, unread=unread) if unread else self._known

    def _read_aside(self, last: int, changed: Sequence[int]) -> None:
        def read() -> None:
            try:
                with Store.open(self._url, read_only=True) as store:
                    for start in range(0, len(changed), PORTION):
                        found = store.glances(
                            self._study, _compact(changed[start : start + PORTION]), self._read
                        )
                        with self._lock:
                            self._take(found)
                            if self._known is not None:
                                self._known = replace(self._known, unread=len(changed) - start - len(found))
                    with self._lock:
                        self._known = self._made(last)
                        self._version = last
            except StorageError:
                # Whoever asks next begins again, and is told what is wrong with the database.
                return

        self._reading = threading.Thread(target=read, name="reading a study", daemon=True)
        self._reading.start()

    def _take(self, found: Sequence[Glance]) -> None:
        most = max((seen.number for seen in found), default=-1) + 1
        grow = max(0, most - len(self._glances))
        # Copies, since whoever holds an earlier snapshot reads the old ones.
        self._glances += [None] * grow
        self._values = np.vstack([self._values, np.full((grow, len(self._study.axes)), np.nan)])
        again = {seen.number for seen in found if seen.repeats}
        self._columns = columns = replace(self._columns.grown(grow), repeated=self._columns.repeated | again)
        for seen in found:
            old = self._glances[seen.number]
            if old is None:
                kept = self._remember(seen)
            else:
                self._counts[old.state] -= 1
                kept = replace(seen, layout=old.layout)
            self._counts[seen.state] += 1
            columns.states[seen.number] = STATES.index(seen.state)
            columns.rungs[seen.number] = seen.rungs[-1][0] if seen.rungs else -1
            columns.origins[seen.number] = self._origins.setdefault(seen.origin, len(self._origins))
            values = np.array(values_of(self._study.axes, seen))
            before = self._values[seen.number]
            if not np.isnan(before).any() and not np.array_equal(before, values):
                # A measured value that changes may uncover what it had beaten: everything is compared anew.
                self._known = None
            self._values[seen.number] = values
            self._glances[seen.number] = kept

    def _remember(self, seen: Glance) -> Glance:
        layers, places = seen.layout.layers, []
        for layer in layers:
            # Equal layers are one object, which `_read` keeps alive.
            if id(layer) not in self._kinds:
                self._kinds[id(layer)] = len(self._layers)
                self._layers.append(layer)
            places.append(self._kinds[id(layer)])
        self._by_layers.setdefault(tuple(places), []).append(seen.number)
        mixers = frozenset(str(branch["mixer"]) for layer in layers for branch in layer.get("branches", ()))
        self._columns.mixers[seen.number] = self._sets.setdefault(mixers, len(self._sets))
        return seen

    def _made(self, version: int) -> Snapshot:
        view = view_of(
            self._study,
            list(self._glances),
            self._values,
            self._known.view if self._known is not None else None,
        )
        return Snapshot(
            study=self._study,
            version=version,
            view=view,
            counts={state: self._counts[state] for state in STATES},
            columns=self._columns,
            mixer_sets=list(self._sets),
            origins=list(self._origins),
            neighbours=self._by_layers,
            layer_kinds=self._layers,
            planned=self._planned,
            device=self._device,
        )


def _planned_in(payload: Mapping[str, Any]) -> int | None:
    """How many trials an event says that a study is to have; None where it says no number."""
    trials = payload.get("trials")
    return trials if isinstance(trials, int) and not isinstance(trials, bool) else None


class Library:
    """The memories of all studies of one database."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._memories: dict[tuple[int, str, float], Memory] = {}

    def snapshot(self, store: Store, study: StudyRecord) -> Snapshot:
        """A study as it stands now."""
        # A database that was replaced under its name has another time of making.
        key = (study.id, study.name, study.created_at)
        with self._lock:
            memory = self._memories.setdefault(key, Memory(self._url, study))
        return memory.snapshot(store)


def _count(store: Store, study: StudyRecord) -> int:
    return sum(store.counts(study).values())


def _compact(numbers: Sequence[int]) -> Sequence[int]:
    """A range where they follow one another, which a database reads faster."""
    if numbers and numbers[-1] - numbers[0] + 1 == len(numbers):
        return range(numbers[0], numbers[-1] + 1)
    return numbers
