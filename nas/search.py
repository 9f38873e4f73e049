"""The search loop: ask, price, run, write, tell. One process writes a study; workers only return."""

import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Protocol

from nas.bounds import Bounds
from nas.errors import Refused
from nas.front import front, hypervolume, values_of
from nas.plan import Plan
from nas.prices import LatencyBook, price
from nas.samplers.sampler import Known, Proposal, Sampler
from nas.workers.pool import Pool
from search_space.cost import at_depth
from search_space.layout import Layout, from_json
from storage.records import LayoutRecord, NewTrial, ResultRecord, StudyRecord, TrialRecord
from storage.store import Store
from trainers.outcome import Lost, Measured, Outcome, Unfit

MOST_ASKED = 60
"""Proposals that may be turned down (known, or against the constraints) before a random one is drawn instead."""
MOST_DRAWN = 5000
POLL_S = 0.25


class Watcher(Protocol):
    """Told of what happens, to show it; it changes nothing."""

    def started(self, trial: TrialRecord) -> None:
        """A trial was given to a worker."""

    def ended(
        self, trial: TrialRecord, *, hypervolume: float, best: TrialRecord | None, reused: bool
    ) -> None:
        """A trial ended, well or not."""

    def skipped(self, layout: Layout, why: str) -> None:
        """A proposal was turned down before training."""

    def stopping(self, running: int) -> None:
        """The person asked to stop; so many trials are still running."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def tick(self, running: int) -> None:
        """Time passes."""


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
    skipped: int = 0
    stop_asked: bool = False
    stopped: bool = False
    given_bounds: Bounds | None = None
    """The plan's rules with what was measured of them already; made of plan and book if left out."""

    def __post_init__(self) -> None:
        self.bounds = self.given_bounds or self.plan.bounds(self.book.milliseconds)

    def run(self) -> Ending:
        """Go on until the study has as many trials as the configuration asks for, or the person stops it."""
        with self.store.writer(self.study), self._heeding_signals():
            try:
                exhausted = self._loop()
                self._check_front()
            except (Stopped, KeyboardInterrupt):
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
            while len(self.running) < self.pool.capacity and not self.stop_asked:
                if waiting:
                    self._run_trial(waiting.pop(0))
                elif exhausted or len(self.trials) >= self.plan.config.trials:
                    break
                elif starts:
                    start = starts.pop(0)
                    params = self.plan.space.params_of(start.layout) or {}
                    token = self.sampler.learn(Known(params=params, attrs={}, values=None))
                    self._open(Proposal(layout=start.layout, params=params, token=token), start.origin)
                else:
                    proposal = self._propose()
                    if proposal is None:
                        exhausted = True
                    else:
                        self._open(proposal, "search")
            if not self.running:
                return exhausted
            done = self.pool.next_done(POLL_S)
            if done is None:
                self.watcher.tick(len(self.running))
            else:
                again = self._settle(*done)
                waiting += [again] if again is not None else []

    def _remember(self) -> None:
        """Fill the memory, and the sampler's, from the tables."""
        for trial in self.store.trials(self.study):
            self.trials[trial.number] = trial
            values = values_of(trial, self.study.axes) if trial.state == "done" else None
            failed = trial.state in ("unfit", "lost")
            known = Known(params=trial.params, attrs=trial.sampler_attrs, values=values, failed=failed)
            self.tokens[trial.number] = self.sampler.learn(known)

    def _known(self, layout: Layout) -> bool:
        return any(trial.layout.key == layout.key for trial in self.trials.values())

    def _propose(self) -> Proposal | None:
        """A pattern that keeps the constraints and is not known yet; None when the space holds no other."""
        number = len(self.trials)
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
        """Price a proposal, write it down, and run it unless its result is known already."""
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
        known = self.store.find_result(trial.evaluation_key)
        if known is None:
            self._run_trial(trial.number)
        else:
            attempt = self.store.start_trial(self.study, trial.number)
            # Another study may have had other rungs on its way; the end is the same.
            known = replace(known, rung=len(self.plan.budget.rungs))
            self.store.finish_trial(self.study, trial.number, attempt, known)
            self._ended(trial.number, reused=True)

    def _run_trial(self, number: int) -> None:
        trial = self.trials[number]
        self.running[number] = self.store.start_trial(self.study, number)
        self.watcher.started(trial)
        self.pool.submit(number, self.plan.job(from_json(trial.layout.layers)))

    def _settle(self, number: int, outcome: Outcome) -> int | None:
        """Write an outcome down; a trial that the machine lost is returned while it may be tried again."""
        attempt = self.running.pop(number)
        match outcome:
            case Measured():
                passed = [self._record(lower) for lower in outcome.rungs]
                self.store.finish_trial(self.study, number, attempt, self._record(outcome), passed=passed)
            case Unfit(why=why):
                self.store.fail_trial(self.study, number, attempt, "unfit", why)
            case Lost(why=why):
                again = attempt < self.plan.config.attempts
                self.store.fail_trial(self.study, number, attempt, "waiting" if again else "lost", why)
                if again:
                    self.watcher.note(f"trial {number} was lost and is tried again: {why}")
                    return number
        self._ended(number, reused=False)
        return None

    def _record(self, outcome: Measured) -> ResultRecord:
        return ResultRecord(
            rung=outcome.rung,
            quality=outcome.quality,
            scores=outcome.scores,
            details={
                **outcome.details,
                "metrics": dict(outcome.metrics),
                "new_steps": outcome.new_steps,
            },
            steps=outcome.steps,
            tokens=outcome.tokens,
            train_s=outcome.train_s,
            worker_s=outcome.worker_s,
            seed=self.plan.config.seed,
        )

    def _ended(self, number: int, *, reused: bool) -> None:
        trial = self.store.trial(self.study, number)
        assert trial is not None
        self.trials[number] = trial
        values = values_of(trial, self.study.axes) if trial.state == "done" else None
        self.sampler.tell(self.tokens[number], values)
        done = list(self.trials.values())
        best = front(done, self.study.axes)
        self.watcher.ended(
            trial,
            hypervolume=hypervolume(done, self.study.axes),
            best=best[0] if best else None,
            reused=reused,
        )

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
                threading.Thread(target=self.watcher.stopping, args=(len(self.running),)).start()

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
