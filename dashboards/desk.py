"""What every route works with: the database's address, what is remembered of it, and who computes beyond records."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from dashboards import addresses
from dashboards.growth_chart import Baseline, baseline
from dashboards.memory import Library, Snapshot
from dashboards.reasons import Reasons
from dashboards.scene import NO_DOUBT, Doubt
from storage.glances import Glance
from storage.records import Axis, StudyRecord, TrialRecord
from storage.store import Store

CANDIDATES = 1500
"""So many layouts are weighed for their chance of being on the front: the front, and those with several seeds."""


class Missing(Exception):
    """What was asked for is not in the database; the message says so in one line."""


@dataclass(frozen=True, kw_only=True)
class LayerPrice:
    """What one layer of a network costs at a context and a batch, in the unit of the key."""

    layer: str
    count: int
    """How many layers of the network are this layer of the pattern; the numbers are their sum."""
    params: int
    stored_bytes: int
    read_bytes: int


@dataclass(frozen=True, kw_only=True)
class MeasuredLatency:
    """What one decode step of a network took, as it was measured layer by layer."""

    device: str
    latency_ms: float
    by_layer_ms: tuple[float, ...]
    """Of each layer of the pattern, summed over the layers of the network that are this one."""


@dataclass(frozen=True, kw_only=True)
class NetworkPrice:
    """What `nas cost` says of a layout: exact, in closed form, for the whole network and by layer."""

    layout: str
    context: int
    batch: int
    params: int
    active_params: int
    stored_bytes: int
    read_bytes: int
    flops_prefill: float
    flops_decode: float
    by_layer: tuple[LayerPrice, ...]
    command: str
    """The command line that prints the same."""
    latency_frame: str
    """The sizes that a decode latency depends on, as measurements are kept under."""
    latency: MeasuredLatency | None = None
    """None where not every layer was measured at this context and batch."""


class Workshop(Protocol):
    """Work that needs more than records: it is done on the floor above, and never in the server's own process for long."""

    def price(
        self,
        config: Mapping[str, Any],
        layout: str,
        points: Sequence[tuple[int, int]],
        *,
        width: int | None = None,
    ) -> list[NetworkPrice]:
        """A layout of a study at each (context, batch). Missing where it has no price, and why."""

    def defaults(self) -> Mapping[str, Any]:
        """The configuration of a search that was told nothing."""

    def reasons(self, study: StudyRecord, version: int) -> Reasons | str:
        """Why its layouts are as good as they are, or in words why that is not to be had now."""

    def doubt(self, axes: Sequence[Axis], seen: Sequence[Glance]) -> Doubt:
        """What further seeds of these trials say."""


@dataclass(frozen=True, kw_only=True)
class Desk:
    """One database, as the routes see it."""

    url: str
    library: Library
    workshop: Workshop | None = None
    _lucks: dict[tuple[str, float], tuple[int, Baseline | None]] = field(default_factory=dict)
    _doubts: dict[tuple[str, float], tuple[tuple[int, int], Doubt]] = field(default_factory=dict)

    @contextmanager
    def store(self) -> Iterator[Store]:
        """The database, open for reading within the block alone."""
        with Store.open(self.url, read_only=True) as store:
            yield store

    @contextmanager
    def study(self, segment: str) -> Iterator[tuple[Store, StudyRecord]]:
        """The database, and the study that a path segment stands for; Missing where there is none."""
        with self.store() as store:
            yield store, find_study(store, addresses.name_of(segment))

    def snapshot(self, segment: str) -> Snapshot:
        """The study that a path segment stands for, as it stands now; Missing where there is none."""
        with self.study(segment) as (store, study):
            return self.library.snapshot(store, study)

    def doubt(self, snapshot: Snapshot) -> Doubt:
        """What further seeds say of a study; nothing where no layout has any."""
        view = snapshot.view
        repeated = snapshot.repeated
        if self.workshop is None or not repeated:
            return NO_DOUBT
        key = (snapshot.study.name, snapshot.study.created_at)
        # New results alone change it, so that it is not computed anew for a trial that merely began.
        state = (len(view.measured), sum(len(seen.repeats) for seen in repeated))
        known = self._doubts.get(key)
        if known is None or known[0] != state:
            numbers = view.measured.tolist()
            if len(numbers) > CANDIDATES:
                near = {*view.front_numbers.tolist(), *(seen.number for seen in repeated)}
                numbers = sorted(near & set(numbers))[:CANDIDATES]
            known = self._doubts[key] = (
                state,
                self.workshop.doubt(view.axes, [view.glance(n) for n in numbers]),
            )
        return known[1]

    def luck(self, snapshot: Snapshot) -> Baseline | None:
        """What luck would have made of a study's layouts; worked out anew once they are a few per cent more."""
        key = (snapshot.study.name, snapshot.study.created_at)
        count = len(snapshot.view.measured)
        known = self._lucks.get(key)
        if known is None or not known[0] <= count < 1 + known[0] * 1.03:
            known = self._lucks[key] = (count, baseline(snapshot.view))
        return known[1]


def find_study(store: Store, name: str) -> StudyRecord:
    """The study of this name, or Missing."""
    # A zero byte is no text to PostgreSQL, so no study is ever called that.
    study = None if "\0" in name else store.study(name)
    if study is None:
        raise Missing(f"There is no study called “{name}” in {store.shown_url}.")
    return study


def find_trial(store: Store, study: StudyRecord, number: int) -> TrialRecord:
    """The trial of this number, or Missing."""
    trial = store.trial(study, number)
    if trial is None:
        raise Missing(f"The study “{study.name}” has no trial {number}.")
    return trial
