"""The search loop: ask, price, run, write, tell. One process writes a study; workers only return."""

import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from types import FrameType
from typing import Literal

from nas.bounds import Bounds
from nas.climb import Climb, calibrations
from nas.errors import Refused
from nas.front import front, hypervolume, values_of
from nas.plan import Plan, Start
from nas.prices import LatencyBook, price
from nas.repeats import Repeats
from nas.results import records_of, refuse_other_data
from nas.samplers.sampler import Known, Proposal, Sampler
from nas.watcher import Watcher
from nas.workers.pool import Pool
from search_space.cost import at_depth
from search_space.layout import Layout, from_json
from storage.records import LayoutRecord, NewTrial, StudyRecord, TrialRecord
from storage.store import Store
from trainers.evaluate import Job
from trainers.outcome import Lost, Measured, Outcome, Unfit

MOST_ASKED = 60
"""Proposals that may be turned down (known, or against the constraints) before a random one is drawn instead."""
MOST_DRAWN = 5000
POLL_S = 0.25


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a search ended."""

    interrupted: bool
    exhausted: bool
    """Every pattern of the space has been tried."""
    skipped: int


class Stopped(Exception):
    """A second Ctrl-C, or a request to terminate: stop at once."""


@dataclass
class Search:
    """A running search. Its fields are what it works with; `run` does the work."""

    plan: Plan
    store: Store
    study: StudyRecord
    pool: Pool
    sampler: Sampler
    book: LatencyBook
    watcher: Watcher
    trials: dict[int, TrialRecord] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    running: dict[int, int] = field(default_factory=dict)
    """Trial number to attempt."""
    climb: Climb | None = None
    """Where rungs may stop a trial."""
    jobs: dict[int, Job] = field(default_factory=dict)
    """What runs, by trial number."""
    told: dict[int, list[float]] = field(default_factory=dict)
    """What the sampler was told to expect of trials that rest."""
    skipped: int = 0
    stop_asked: bool = False
    stopped: bool = False
    given_bounds: Bounds | None = None
    """The plan's rules with what was measured of them already; made of plan and book if left out."""

    def __post_init__(self) -> None:
        self.bounds = self.given_bounds or self.plan.bounds(self.book.milliseconds)
        watcher = self.watcher
        self.repeats = Repeats(self.plan, self.store, self.study, self.pool, watcher.repeated, watcher.note)

    def run(self) -> Ending:
        """Go on until the study has as many trials as the configuration asks for, or the person stops it."""
        with self.store.writer(self.study), self._heeding_signals():
            try:
                exhausted = self._loop()
                self._close_rungs()
                self._check_front()
            except (Stopped, KeyboardInterrupt, SystemError) as error:
                # Compiled code that a signal interrupts, Ray's among it, may hide the exception that the signal raised.
                if isinstance(error, SystemError) and not self.stopped:
                    raise
                self._put_back()
                self.pool.stop()
                return Ending(interrupted=True, exhausted=False, skipped=self.skipped)
        if self.stop_asked:
            return Ending(interrupted=True, exhausted=False, skipped=self.skipped)
        return Ending(interrupted=False, exhausted=exhausted, skipped=self.skipped)

    def _loop(self) -> bool:
        self.store.requeue_running(self.study)
        self._remember()
        waiting = [trial.number for trial in self.trials.values() if trial.state == "waiting"]
        starts = [
            start
            for start in self.plan.starts
            if not self._known(start.layout) and self.bounds.why_not(start.layout) is None
        ]
        exhausted = False
        while True:
            while self._busy() < self.pool.capacity and not self.stop_asked:
                if waiting:
                    self._run_trial(waiting.pop(0))
                elif self.climb and (number := self.climb.next(waiting)) is not None:
                    self._run_trial(number)
                elif exhausted or len(self.trials) >= self.plan.config.trials:
                    # Whose place on the front is unsure is known when all others have ended.
                    if self.running or not self.repeats.begin(self.trials):
                        break
                else:
                    exhausted = not self._open_new(starts)
            if not self._busy():
                return exhausted
            done = self.pool.next_done(POLL_S)
            if done is None:
                self.watcher.tick(self._busy())
                continue
            refuse_other_data(done[1], self.plan.data)
            if done[0] in self.repeats.under_way:
                self.repeats.settle(*done, self.trials)
            else:
                again = self._settle(*done)
                waiting += [again] if again is not None else []

    def _busy(self) -> int:
        return len(self.running) + len(self.repeats.under_way)

    def _remember(self) -> None:
        """Fill the memory, and the sampler's, from the tables."""
        for trial in self.store.trials(self.study):
            self.trials[trial.number] = trial
            if self.climb:
                self.climb.see(trial)
        if self.climb:
            self.told = dict(self.climb.expected())
            # What was said before the search went on is not said again.
            self.climb.doubts()
        for trial in self.trials.values():
            values = values_of(trial, self.study.axes) if trial.state == "done" else None
            values = self.told.get(trial.number, values)
            failed = trial.state in ("unfit", "lost")
            known = Known(params=trial.params, attrs=trial.sampler_attrs, values=values, failed=failed)
            self.tokens[trial.number] = self.sampler.learn(known)

    def _open_new(self, starts: list[Start]) -> bool:
        """Begin the next layout, one of the starts if that is due or the sampler has none left; False if there is none."""
        if not (starts and starts[0].due(len(self.trials))) and (proposal := self._propose()) is not None:
            self._open(proposal, "search")
            return True
        if not starts:
            return False
        start = starts.pop(0)
        params = self.plan.space.params_of(start.layout) or {}
        token = self.sampler.learn(Known(params=params, attrs={}, values=None))
        self._open(Proposal(layout=start.layout, params=params, token=token), start.origin)
        return True

    def _known(self, layout: Layout) -> bool:
        return any(trial.layout.key == layout.key for trial in self.trials.values())

    def _propose(self) -> Proposal | None:
        """A pattern that keeps the constraints and is not known yet; None when the space holds no other."""
        number = len(self.trials)
        self._tell_expected()
        for attempt in range(MOST_ASKED):
            proposal = self.sampler.ask(number, attempt)
            why = self.bounds.why_not(proposal.layout)
            if why is None and not self._known(proposal.layout):
                return proposal
            self.sampler.tell(proposal.token, None)
            if why is not None:
                self.skipped += 1
                self.watcher.skipped(proposal.layout, why)
        return self._draw_unknown(number)

    def _tell_expected(self) -> None:
        """Tell the sampler what the rungs let expect of trials that have not been trained to the end."""
        for number, values in (self.climb.expected() if self.climb else {}).items():
            if self.told.get(number) != values:
                self.sampler.tell(self.tokens[number], values)
                self.told[number] = values

    def _draw_unknown(self, number: int) -> Proposal | None:
        """When the sampler repeats itself: a random pattern, so that no trial is wasted."""
        space = self.plan.space
        inside = sum(bool(trial.params) for trial in self.trials.values())
        if self.plan.size.exact and inside >= self.plan.size.count:
            return None
        rng = random.Random(f"{self.plan.config.seed}/{number}")
        if self.plan.rules.limits or self.plan.widths is not None:
            layout = self.bounds.sample(rng, self._known)
        else:
            drawn = (space.sample(rng) for _ in range(MOST_DRAWN))
            layout = next((one for one in drawn if not self._known(one)), None)
        if layout is None:
            return None
        params = space.params_of(layout) or {}
        token = self.sampler.learn(Known(params=params, attrs={}, values=None))
        return Proposal(layout=layout, params=params, token=token)

    def _open(self, proposal: Proposal, origin: str) -> None:
        """Price a proposal, write it down, and run it."""
        layout = proposal.layout
        try:
            priced = price(self.plan, layout, self.book)
        except ValueError as error:
            raise Refused(f"{layout} cannot be measured at the target: {error}") from error
        trial = self.store.add_trial(
            self.study,
            NewTrial(
                layout=LayoutRecord(key=layout.key, text=layout.text, layers=tuple(layout.to_json())),
                origin=origin,
                params=proposal.params,
                sampler_attrs=proposal.attrs,
                costs=priced.costs,
                layer_costs=priced.layer_costs,
                evaluation_key=self.plan.evaluation_key(layout),
            ),
        )
        self.trials[trial.number], self.tokens[trial.number] = trial, proposal.token
        self._run_trial(trial.number)

    def _run_trial(self, number: int) -> None:
        """Send a trial on, unless its result is known already: from another study, or from a layout with the same proxy."""
        trial = self.trials[number]
        known = self.store.find_result(trial.evaluation_key)
        # A repeat that diverged scores 0 among its seeds; a trial that does has no score, and says why itself.
        if known is not None and "unfit" not in known.details:
            # Another study may have had other rungs on its way; the end is the same.
            details = {**known.details, "new_steps": 0}
            known = replace(known, rung=len(self.plan.budget.rungs), details=details)
            attempt = self.store.start_trial(self.study, number)
            self.store.finish_trial(self.study, number, attempt, known)
            self._ended(number, reused=True)
            return
        if self.climb:
            self.climb.see(trial)
            job = self.climb.job(trial)
            self.climb.see(trial, heading=job.goal)
        else:
            job = self.plan.job(from_json(trial.layout.layers))
        self.running[number] = self.store.start_trial(self.study, number)
        self.jobs[number] = job
        self.watcher.started(trial)
        self.pool.submit(number, job)

    def _settle(self, number: int, outcome: Outcome) -> int | None:
        """Write an outcome down; a trial that the machine lost is returned while it may be tried again."""
        attempt, job = self.running.pop(number), self.jobs.pop(number)
        match outcome:
            case Measured():
                stored = {result.rung for result in self.trials[number].results}
                *passed, result = records_of(outcome, stored, self.plan.config.seed)
                state: Literal["done", "pruned"] = (
                    "done" if outcome.rung == len(self.plan.budget.rungs) else "pruned"
                )
                self.store.finish_trial(self.study, number, attempt, result, state=state, passed=passed)
                if why := outcome.details.get("restarted", outcome.details.get("checkpoint")):
                    self.watcher.note(f"trial {number}: {why}")
            case Unfit(why=why):
                self.store.fail_trial(self.study, number, attempt, "unfit", why)
            case Lost(why=why):
                # What brought a result was not lost.
                again = attempt - len(self.trials[number].results) < self.plan.config.attempts
                self.store.fail_trial(self.study, number, attempt, "waiting" if again else "lost", why)
                if again:
                    if self.climb:
                        self.climb.see(self.trials[number])
                    self.watcher.note(f"trial {number} was lost and is tried again: {why}")
                    return number
        if self.climb:
            self.climb.settled(number, job)
        self._ended(number, reused=False)
        return None

    def _ended(self, number: int, *, reused: bool) -> None:
        trial = self.store.trial(self.study, number)
        assert trial is not None
        self.trials[number] = trial
        self._note_rungs(trial)
        if trial.state == "pruned":
            self._tell_expected()
        else:
            self.told.pop(number, None)
            self.sampler.tell(
                self.tokens[number],
                values_of(trial, self.study.axes) if trial.state == "done" else None,
            )
        done = list(self.trials.values())
        best = front(done, self.study.axes)
        self.watcher.ended(
            trial,
            hypervolume=hypervolume(done, self.study.axes),
            best=best[0] if best else None,
            reused=reused,
        )

    def _note_rungs(self, trial: TrialRecord) -> None:
        """Let the rungs see how a trial ended, and say which of them lost their trust by it."""
        if self.climb is None:
            return
        self.climb.see(trial)
        doubts = self.climb.doubts()
        for text in doubts:
            self.watcher.note(text)
        if doubts:
            self._log_calibration()

    def _log_calibration(self) -> None:
        if self.climb is not None:
            rungs = [asdict(own) for own in calibrations(self.climb.ladder)]
            self.store.log(self.study, "rungs_calibrated", {"rungs": rungs})

    def _close_rungs(self) -> None:
        """Note what the rungs are worth; when all is done, let the checkpoints go."""
        self._log_calibration()
        if self.climb is not None and not self.stop_asked:
            self.climb.close()

    def _check_front(self) -> None:
        """Run the front's networks end to end, since a sum over layers is only nearly their latency."""
        for trial in front(list(self.trials.values()), self.study.axes):
            if "latency_ms_whole" in trial.costs or self.stop_asked:
                continue
            layout = from_json(trial.layout.layers)
            target = self.plan.target_of(layout)
            network = at_depth(layout, target, self.plan.config.target.fill)
            self.watcher.note(f"measuring trial {trial.number} end to end: {trial.layout.text}")
            try:
                whole = self.book.network(network, target)
            except ValueError as error:
                self.watcher.note(f"trial {trial.number} is not checked end to end: {error}")
                continue
            self.store.update_costs(self.study, trial.number, {"latency_ms_whole": whole.latency_ms})

    def _put_back(self) -> None:
        """What was running when the search was cut off waits for its continuation."""
        for number, attempt in self.running.items():
            self.store.fail_trial(self.study, number, attempt, "waiting", "interrupted")

    @contextmanager
    def _heeding_signals(self) -> Iterator[None]:
        """First Ctrl-C: finish what runs. Second one, or SIGTERM: stop at once. Both keep every result."""

        def interrupted(_signal: int, _frame: FrameType | None) -> None:
            if self.stop_asked:
                stop()
            else:
                self.stop_asked = True
                # The signal may have come in the middle of a line: another thread waits for the end of it.
                threading.Thread(target=self.watcher.stopping, args=(self._busy(),)).start()

        def terminated(_signal: int, _frame: FrameType | None) -> None:
            stop()

        def stop() -> None:
            # Once: a further signal must not break into the putting back.
            if not self.stopped:
                self.stop_asked = self.stopped = True
                raise Stopped

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = signal.signal(signal.SIGINT, interrupted), signal.signal(signal.SIGTERM, terminated)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, old[0])
            signal.signal(signal.SIGTERM, old[1])
