"""The store: the only door to the records. Every change is one transaction; every refusal is a StorageError."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self

from sqlalchemy import Connection

from storage import attempts, disks, drivers, events, latency, points, repeats, schema, studies, trials
from storage.engine import Database
from storage.errors import ConnectionLost, StorageError, Taken
from storage.glances import Glance, Layers, read_glances
from storage.leases import LEASE_S, Lease, leased
from storage.locks import writer_lock
from storage.place import place_of
from storage.plain import numbers as finite_numbers
from storage.points import Points
from storage.portions import read_in_portions
from storage.records import (
    Axis,
    EventRecord,
    LatencyRecord,
    NewTrial,
    ResultRecord,
    State,
    StudyRecord,
    TrialRecord,
)
from storage.results import result_values
from storage.summary import Summary, refresh
from storage.tables import SCHEMA_VERSION


class Store:
    """Studies, trials, results, latencies and events in one SQLite or PostgreSQL database.

    Use it from several threads as you like. Values that cannot be stored are a ValueError before anything is
    written; whatever the database says is a StorageError, and then nothing of that call was written.
    """

    def __init__(self, url: str, database: Database) -> None:
        self.url = url
        self._database = database
        self._repeats_known = not database.read_only

    @classmethod
    def open(cls, url: str, *, read_only: bool = False) -> Self:
        """Opens sqlite:///file.db, sqlite:// (memory) or postgresql://…; StorageError if that cannot be used.

        A writer makes the tables where there are none, and is refused where they are older: Outdated says what to do.
        A reader never makes or changes anything, and reads older versions as they are.
        """
        database = Database(place_of(url), read_only=read_only)
        try:
            if read_only:
                schema.require(database)
            else:
                schema.make_or_require(database)
        except BaseException:
            database.close()
            raise
        return cls(url, database)

    def close(self) -> None:
        """Closes every connection; using the store afterwards is a StorageError."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({self.shown_url!r})"

    @property
    def warning(self) -> str | None:
        """What a writer should know of where the database lies; None if there is nothing."""
        path = self._database.place.path
        return None if path is None else disks.warning(path)

    @property
    def shown_url(self) -> str:
        """The URL without its password, for messages and pages."""
        return self._database.place.shown

    def schema_version(self) -> int:
        """The version of the tables, which a reader takes as they are."""
        with self._database.reading() as connection:
            return schema.version_in(connection, self.shown_url) or SCHEMA_VERSION

    def studies(self) -> list[StudyRecord]:
        """Every study, in the order of making."""
        with self._database.reading() as connection:
            return studies.read_studies(connection)

    def study(self, name: str) -> StudyRecord | None:
        """The study of this name."""
        with self._database.reading() as connection:
            return next(iter(studies.read_studies(connection, name)), None)

    def create_study(
        self,
        *,
        name: str,
        config: Mapping[str, Any],
        config_hash: str,
        axes: Sequence[Axis],
        families: Mapping[str, str],
    ) -> StudyRecord:
        """Makes a study. StorageError where the name is taken, ValueError where a value cannot be stored."""
        values = studies.study_values(name, config, config_hash, axes, families)
        try:
            with self._database.writing() as connection:
                return studies.insert_study(connection, values)
        except Taken:
            said = f"{self.shown_url} has a study {name!r} already: resume that one, or choose another name"
            raise StorageError(said) from None

    @contextmanager
    def writer(self, study: StudyRecord, *, lease_s: float = LEASE_S) -> Iterator[Lease]:
        """A writer's place, with a lease that is renewed. Of a file there is one; StorageError where another process has it."""

        def require_newest() -> None:
            schema.require_newest(self._database)

        with writer_lock(self._database, study, require_newest):
            # An upgrade keeps writers out, but not a process that has opened the database and not begun to write.
            require_newest()
            with leased(self._database, study, lease_s=lease_s) as lease:
                yield lease

    def add_trial(self, study: StudyRecord, new: NewTrial) -> TrialRecord:
        """Adds a waiting trial under the study's next number. ValueError where a cost is not finite."""
        layout, trial = trials.layout_values(new.layout), trials.trial_values(new)
        with self._database.writing() as connection:
            return trials.insert_trial(connection, study, layout, trial)

    def open_trial(
        self, study: StudyRecord, new: NewTrial, lease: Lease, *, most: int
    ) -> tuple[TrialRecord, int] | None:
        """Adds a trial and takes it at once: the trial as it waited, and the number of the attempt.

        None where the study has `most` trials already, or one of this layout: another driver was quicker.
        """
        layout, trial = trials.layout_values(new.layout), trials.trial_values(new)
        with self._database.writing() as connection:
            return trials.open_trial(connection, study, layout, trial, driver_id=lease.driver_id, most=most)

    def start_trial(self, study: StudyRecord, number: int) -> int:
        """Starts a waiting or pruned trial and returns the number of the attempt: 1, 2, … StorageError for another."""
        with self._database.writing() as connection:
            return attempts.start(connection, study, number)

    def claim_trial(self, study: StudyRecord, number: int, lease: Lease) -> int | None:
        """As `start_trial`, for a driver; None where another one was quicker."""
        with self._database.writing() as connection:
            return attempts.claim(connection, study, number, lease.driver_id)

    def claim_waiting(self, study: StudyRecord, lease: Lease) -> tuple[int, int] | None:
        """Takes the first waiting trial that no other driver is taking: its number and the attempt's; None if none waits."""
        with self._database.writing() as connection:
            return attempts.claim_waiting(connection, study, lease.driver_id)

    def finish_trial(
        self,
        study: StudyRecord,
        number: int,
        attempt: int,
        result: ResultRecord,
        *,
        state: Literal["done", "pruned"] = "done",
        costs: Mapping[str, float] | None = None,
        passed: Sequence[ResultRecord] = (),
    ) -> bool:
        """Commits a result once; False, and nothing changed, where this attempt is no longer the running one.

        A pruned trial may be started again. `passed` are results of lower rungs, committed with it. ValueError, before
        anything is written, where the quality, a score, a cost or a time is not finite.
        """
        values = [result_values(one) for one in (*passed, result)]
        more_costs = finite_numbers(costs or {}, "costs")

        def commit() -> bool:
            with self._database.writing() as connection:
                return attempts.finish(
                    connection, study, number, attempt, results=values, state=state, costs=more_costs
                )

        try:
            return commit()
        except ConnectionLost:  # perhaps during the commit: what became of it is asked, not assumed
            return self._stands(study, number, attempt, state) or commit()

    def add_repeat(self, study: StudyRecord, number: int, evaluation_key: str, result: ResultRecord) -> bool:
        """Adds what a further seed gave to a done trial; False, and no change, where it has it. ValueError: not finite."""
        values = result_values(result)

        def commit() -> bool:
            with self._database.writing() as connection:
                return repeats.insert_repeat(connection, study, number, evaluation_key, values)

        try:
            return commit()
        except ConnectionLost:  # a seed is added once, so asking again does no harm
            trial = self.trial(study, number)
            return (trial is not None and any(one.seed == result.seed for one in trial.repeats)) or commit()

    def claim_repeat(self, study: StudyRecord, number: int, seed: int, lease: Lease, *, most: int) -> bool:
        """Takes a further seed; False where another driver has it, its result is there, or the study has `most`."""
        with self._database.writing() as connection:
            return repeats.claim_repeat(connection, study, number, seed, lease.driver_id, most=most)

    def claimed_repeats(self, study: StudyRecord) -> list[tuple[int, int, int]]:
        """Trial, seed and driver of every further seed that is being trained."""
        with self._database.reading() as connection:
            return repeats.read_claims(connection, study)

    def fail_trial(
        self,
        study: StudyRecord,
        number: int,
        attempt: int,
        state: Literal["unfit", "lost", "quarantined", "waiting"],
        why: str,
    ) -> bool:
        """Ends an attempt without a result ("waiting": back for another); False where it is not the running one."""

        def commit() -> bool:
            with self._database.writing() as connection:
                return attempts.fail(connection, study, number, attempt, state=state, why=why)

        try:
            return commit()
        except ConnectionLost:
            return self._stands(study, number, attempt, state) or commit()

    def lose_trial(
        self,
        study: StudyRecord,
        number: int,
        attempt: int,
        why: str,
        *,
        last: Literal["lost", "quarantined"],
        most: int,
    ) -> State | None:
        """Ends an attempt that failed: the trial waits for another, or ends as `last` if it was the `most`-th in a row.

        Returns the state that it has then; None, and nothing changed, where this is not the running attempt.
        """

        def commit() -> State | None:
            with self._database.writing() as connection:
                return attempts.lose(connection, study, number, attempt, last=last, why=why, attempts=most)

        try:
            return commit()
        except ConnectionLost:
            ended: tuple[State, ...] = ("waiting", last)
            return next((one for one in ended if self._stands(study, number, attempt, one)), None) or commit()

    def requeue_abandoned(self, study: StudyRecord) -> list[int]:
        """Running trials whose driver is gone, or silent for longer than its lease, wait again. Returns their numbers."""
        with self._database.writing() as connection:
            drivers.end_gone(connection, study)
            drivers.end_silent(connection, study)
            return attempts.requeue_abandoned(connection, study)

    def retry_trials(self, study: StudyRecord, numbers: Collection[int]) -> list[int]:
        """Lets unfit, lost and quarantined trials wait for another attempt. StorageError, and no change, for others."""
        with self._database.writing() as connection:
            return attempts.retry(connection, study, sorted(numbers))

    def set_aside(self, evaluation_key: str) -> str | None:
        """In words, which quarantined trial of any study here would train exactly this; None if there is none."""
        with self._database.reading() as connection:
            found = trials.read_set_aside(connection, evaluation_key)
            return None if found is None else f"as trial {found[1]} of study {found[0]!r}: {found[2]}"

    def changed_trials(self, study: StudyRecord, after: int | None) -> tuple[int, list[int]]:
        """The number of the study's last event, and the trials that events after a number tell of; of none, none."""
        with self._database.reading() as connection:
            return trials.read_changed(connection, study, after)

    def update_costs(self, study: StudyRecord, number: int, costs: Mapping[str, float]) -> None:
        """Adds to a trial's costs or replaces them by name, in whatever state. ValueError where one is not finite."""
        checked = finite_numbers(costs, "costs")
        with self._database.writing() as connection:
            trials.merge_costs(connection, study, number, checked)

    def trials(
        self,
        study: StudyRecord,
        *,
        states: Collection[State] | None = None,
        numbers: Collection[int] | None = None,
        offset: int = 0,
        limit: int | None = None,
    ) -> list[TrialRecord]:
        """Trials with their results, by number; a few queries, however many they are. `numbers`: those alone.

        All trials of a file are read in portions, each of one moment: a reader holds up the file's writer meanwhile.
        """
        if offset < 0 or (limit is not None and limit < 0):
            raise ValueError(f"offset is {offset} and limit is {limit}: neither may be negative")
        whole = limit is None and numbers is None and not offset
        if whole and self._database.read_only and self._database.place.kind == "file":
            return read_in_portions(self._database.reading, study, states, self._has_repeats)
        with self._database.reading() as connection:
            return trials.read_trials(
                connection,
                study,
                states=states,
                numbers=numbers,
                offset=offset,
                limit=limit,
                repeats=self._has_repeats(connection),
            )

    def trial(self, study: StudyRecord, number: int) -> TrialRecord | None:
        """The trial of this number."""
        return next(iter(self.trials(study, numbers=[number])), None)

    def glances(self, study: StudyRecord, numbers: Collection[int], layers: Layers) -> list[Glance]:
        """The trials of these numbers at a glance, in short transactions; `layers` keeps what was decoded."""
        return read_glances(self._database.reading, study, numbers, self._has_repeats, layers)

    def points(self, study: StudyRecord) -> Points:
        """What every done trial has on the study's axes, in one short query."""
        with self._database.reading() as connection:
            if schema.has_points(connection):
                return points.read(connection, study)
        return points.of_trials(study, self.trials(study, states=["done"]))

    def notable(self, study: StudyRecord) -> tuple[list[int], list[int]]:
        """The numbers of done trials that no search found, and of those that were trained with further seeds."""
        with self._database.reading() as connection:
            return points.notable(connection, study, repeats=self._has_repeats(connection))

    def counts(self, study: StudyRecord) -> dict[State, int]:
        """How many trials stand in each state, zeros included."""
        with self._database.reading() as connection:
            return trials.count_states(connection, study)

    def summary(self, study: StudyRecord, known: Summary | None = None) -> Summary:
        """How a study stands in numbers; given what was known before, only what has happened since is read."""
        return refresh(self._database.reading, study, known, has_repeats=self._has_repeats)

    def find_result(self, evaluation_key: str) -> ResultRecord | None:
        """The result of a done trial or a repeat, of any study here, that trained exactly this."""
        with self._database.reading() as connection:
            return trials.read_result(connection, evaluation_key, repeats=self._has_repeats(connection))

    def latency(
        self, *, device: str, frame: str, subject: str, phase: Literal["decode", "prefill"], whole: bool
    ) -> LatencyRecord | None:
        """The measurement of exactly this, if there is one."""
        with self._database.reading() as connection:
            return latency.read_latency(
                connection, device=device, frame=frame, subject=subject, phase=phase, whole=whole
            )

    def latencies(self, *, device: str = "", frames: Collection[str] | None = None) -> list[LatencyRecord]:
        """Every measurement, or those of one device, or in some frames."""
        with self._database.reading() as connection:
            return latency.read_latencies(connection, device, frames)

    def put_latency(self, record: LatencyRecord) -> None:
        """Stores a measurement in the place of an older one of the same thing. ValueError where it is not finite."""
        values = latency.latency_values(record)
        with self._database.writing() as connection:
            latency.replace_latency(connection, values)

    def log(self, study: StudyRecord | None, kind: str, payload: Mapping[str, Any]) -> int:
        """Appends an event and returns its number. NaN and infinity in the payload become None."""
        with self._database.writing() as connection:
            return events.add_events(connection, None if study is None else study.id, kind, [payload])[0]

    def events(
        self, *, study: StudyRecord | None = None, after: int = 0, limit: int = 1000
    ) -> list[EventRecord]:
        """Events in order after a number, of one study or of all: give the last `seq` seen to go on from there."""
        with self._database.reading() as connection:
            return events.read_events(connection, None if study is None else study.id, after, limit)

    def last_events(self, study: StudyRecord, kinds: set[str], after: int, most: int) -> list[EventRecord]:
        """The last events of some kinds, in order, of those after a number."""
        with self._database.reading() as connection:
            return events.read_last_events(connection, study.id, kinds, after, most)

    def _has_repeats(self, connection: Connection) -> bool:
        """Whether the tables hold repeats; those of an older version do once a writer has opened them."""
        self._repeats_known = self._repeats_known or schema.has_repeats(connection)
        return self._repeats_known

    def _stands(self, study: StudyRecord, number: int, attempt: int, state: State) -> bool:
        trial = self.trial(study, number)
        return trial is not None and trial.state == state and trial.attempts == attempt
