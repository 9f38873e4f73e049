"""The search loop: ask, price, run, write, tell. Drivers write a study, one or, on a server, several; workers only return."""

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from nas.bounds import Bounds
from nas.climb import Climb, calibrations
from nas.errors import Refused
from nas.front import front
from nas.memory import Memory
from nas.others import Others
from nas.plan import Plan, Start
from nas.prices import LatencyBook, price
from nas.repeats import Repeats
from nas.results import records_of, refuse_other_data
from nas.samplers.sampler import Known, Proposal, Sampler
from nas.stopping import Stopped, Stopping
from nas.watcher import Watcher
from nas.workers.pool import Pool
from search_space.cost import at_depth
from search_space.layout import from_json
from storage.events import PLANNED
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
    running: dict[int, int] = field(default_factory=dict)
    """Trial number to attempt."""
    climb: Climb | None = None
    """Where rungs may stop a trial."""
    jobs: dict[int, Job] = field(default_factory=dict)
    """What runs, by trial number."""
    skipped: int = 0
    given_bounds: Bounds | None = None
    """The plan's rules with what was measured of them already; made of plan and book if left out."""
    isolate: Callable[[int], None] | None = None
    """Of a pool that trains in this very process: told of trials that may end it, before they are submitted."""

    def __post_init__(self) -> None:
        self.bounds = self.given_bounds or self.plan.bounds(self.book.milliseconds)
        self.stopping = Stopping()
        self.memory = Memory(self.study, self.sampler, self.climb)

    def run(self) -> Ending:
        """Go on until the study has as many trials as the configuration asks for, or the person stops it."""
        writer = self.store.writer(self.study, lease_s=self.plan.config.lease_s)
        heeding = self.stopping.heeding(lambda: self.watcher.stopping(self._busy()))
        with writer as self.lease:
            self.others = Others(self.store, self.study, self.lease)
            told = self.memory.keep, self._follow, self.watcher.repeated, self.watcher.note
            self.repeats = Repeats(self.plan, self.store, self.study, self.pool, self.others, *told)
            about = {"trials": self.plan.config.trials, "device": self.book.device_name}
            self.store.log(self.study, PLANNED, about)
            with heeding:
                try:
                    exhausted = self._loop()
                    if exhausted:  # the space holds no more
                        self.store.log(self.study, PLANNED, {**about, "trials": len(self.memory.trials)})
                    self._close_rungs()
                    self._check_front()
                except (Stopped, KeyboardInterrupt, SystemError) as error:
                    # Compiled code that a signal interrupts, Ray's among it, may hide the exception that the signal raised.
                    if isinstance(error, SystemError) and not self.stopping.at_once:
                        raise
                    self._put_back()
                    self.pool.stop()
                    return Ending(interrupted=True, exhausted=False, skipped=self.skipped)
        if self.stopping.asked:
            return Ending(interrupted=True, exhausted=False, skipped=self.skipped)
        return Ending(interrupted=False, exhausted=exhausted, skipped=self.skipped)

    def _loop(self) -> bool:
        self.memory.fill(self.store.trials(self.study))
        starts = [
            start
            for start in self.plan.starts
            if not self.memory.knows(start.layout) and self.bounds.why_not(start.layout) is None
        ]
        exhausted = False
        while True:
            self._follow()
            while self._busy() < self.pool.capacity and not self.stopping.asked:
                if self._take_waiting():
                    continue
                if self.climb and (number := self.climb.next(self.memory.waiting)) is not None:
                    self._go_on(number)
                elif exhausted or len(self.memory.trials) >= self.plan.config.trials:
                    # Whose place on the front is unsure is known when all others have ended.
                    if self._under_way() or not self.repeats.begin(self.memory.trials):
                        break
                else:
                    exhausted = not self._open_new(starts)
            if not self._busy():
                if self.stopping.asked or not (self._under_way() or self.others.repeating()):
                    return exhausted
                # Other drivers are at work; should one of them die, what it had is taken over here.
                time.sleep(POLL_S)
                self.watcher.tick(0)
                continue
            done = self.pool.next_done(POLL_S)
            if done is None:
                self.watcher.tick(self._busy())
                continue
            refuse_other_data(done[1], self.plan.data)
            if done[0] in self.repeats.under_way:
                self.repeats.settle(*done, self.memory.trials)
            else:
                self._settle(*done)

    def _busy(self) -> int:
        return len(self.running) + len(self.repeats.under_way)

    def _under_way(self) -> bool:
        """Whether a trial runs or waits, here or with another driver."""
        if self.running or self.lease.exclusive:
            return bool(self.running)
        return bool(self.memory.open)

    def _follow(self) -> None:
        """Take in what other drivers did."""
        for trial in self.others.changed():
            self._take_in(trial)

    def _take_in(self, trial: TrialRecord) -> None:
        if trial.number not in self.running and self.memory.take_in(trial):
            self.watcher.followed(trial, hypervolume=self.memory.best.hypervolume)

    def _open_new(self, starts: list[Start]) -> bool:
        """Begin the next layout, one of the starts if that is due or the sampler has none left; False if there is none."""
        if (
            not (starts and starts[0].due(len(self.memory.trials)))
            and (proposal := self._propose()) is not None
        ):
            self._open(proposal, "search")
            return True
        if not starts:
            return False
        start = starts.pop(0)
        params = self.plan.space.params_of(start.layout) or {}
        token = self.sampler.learn(Known(params=params, attrs={}, values=None))
        self._open(Proposal(layout=start.layout, params=params, token=token), start.origin)
        return True

    def _propose(self) -> Proposal | None:
        """A pattern that keeps the constraints and is not known yet; None when the space holds no other."""
        number = len(self.memory.trials)
        self.memory.tell_expected()
        for attempt in range(MOST_ASKED):
            proposal = self.sampler.ask(number, attempt)
            why = self.bounds.why_not(proposal.layout)
            if why is None and not self.memory.knows(proposal.layout):
                return proposal
            self.sampler.tell(proposal.token, None)
            if why is not None:
                self.skipped += 1
                self.watcher.skipped(proposal.layout, why)
        return self._draw_unknown(number)

    def _draw_unknown(self, number: int) -> Proposal | None:
        """When the sampler repeats itself: a random pattern, so that no trial is wasted."""
        space = self.plan.space
        inside = sum(bool(trial.params) for trial in self.memory.trials.values())
        if self.plan.size.exact and inside >= self.plan.size.count:
            return None
        rng = random.Random(f"{self.plan.config.seed}/{number}")
        if self.plan.rules.limits or self.plan.widths is not None:
            layout = self.bounds.sample(rng, self.memory.knows)
        else:
            drawn = (space.sample(rng) for _ in range(MOST_DRAWN))
            layout = next((one for one in drawn if not self.memory.knows(one)), None)
        if layout is None:
            return None
        params = space.params_of(layout) or {}
        token = self.sampler.learn(Known(params=params, attrs={}, values=None))
        return Proposal(layout=layout, params=params, token=token)

    def _open(self, proposal: Proposal, origin: str) -> None:
        """Price a proposal, write it down, and run it, unless another driver was quicker."""
        layout = proposal.layout
        try:
            priced = price(self.plan, layout, self.book)
        except ValueError as error:
            raise Refused(f"{layout} cannot be measured at the target: {error}") from error
        opened = self.store.open_trial(
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
            self.lease,
            most=self.plan.config.trials,
        )
        if opened is None:
            self.sampler.tell(proposal.token, None)
            self._follow()
            return
        trial, attempt = opened
        self.memory.opened(trial, proposal)
        self._run_trial(trial.number, attempt)

    def _take_waiting(self) -> bool:
        """Run the first trial that waits; False if there is none."""
        claimed = self.store.claim_waiting(self.study, self.lease) if self.memory.waiting else None
        if claimed is None:
            self.memory.waiting.clear()  # others took them, and it will be heard
            return False
        number, attempt = claimed
        if number not in self.memory.trials:
            self._follow()
        self.memory.waiting.discard(number)
        self._run_trial(number, attempt)
        return True

    def _go_on(self, number: int) -> None:
        """Run a trial that rests at a rung, unless another driver was quicker."""
        attempt = self.store.claim_trial(self.study, number, self.lease)
        if attempt is None:
            self._refresh(number)
        else:
            self._run_trial(number, attempt)

    def _refresh(self, number: int) -> None:
        trial = self.store.trial(self.study, number)
        assert trial is not None
        self._take_in(trial)

    def _run_trial(self, number: int, attempt: int) -> None:
        """Send a trial on, unless its result is known already: from another study, or from a layout with the same proxy."""
        trial = self.memory.trials[number]
        known = self.store.find_result(trial.evaluation_key)
        # A repeat that diverged scores 0 among its seeds; a trial that does has no score, and says why itself.
        if known is not None and "unfit" not in known.details:
            # Another study may have had other rungs on its way; the end is the same.
            details = {**known.details, "new_steps": 0}
            known = replace(known, rung=len(self.plan.budget.rungs), details=details)
            self.store.finish_trial(self.study, number, attempt, known)
            self._ended(number, reused=True)
            return
        # Who was tried here before is tried again because somebody asked for it.
        if attempt == 1 and (why := self.store.set_aside(trial.evaluation_key)) is not None:
            self.store.fail_trial(self.study, number, attempt, "quarantined", why)
            self._ended(number, reused=True)
            return
        if self.climb:
            self.climb.see(trial)
            job = self.climb.job(trial)
            self.climb.see(trial, heading=job.goal)
        else:
            job = self.plan.job(from_json(trial.layout.layers))
        self.running[number] = attempt
        self.jobs[number] = job
        self.watcher.started(trial)
        if self.isolate is not None and attempt > 1 + len(trial.results):
            self.isolate(number)
        self.pool.submit(number, job)

    def _settle(self, number: int, outcome: Outcome) -> None:
        """Write an outcome down; a trial that the machine lost waits while it may be tried again."""
        attempt, job = self.running.pop(number), self.jobs.pop(number)
        match outcome:
            case Measured():
                stored = {result.rung for result in self.memory.trials[number].results}
                *passed, result = records_of(outcome, stored, self.plan.config.seed)
                state: Literal["done", "pruned"] = (
                    "done" if outcome.rung == len(self.plan.budget.rungs) else "pruned"
                )
                in_time = self.store.finish_trial(
                    self.study, number, attempt, result, state=state, passed=passed
                )
                if why := outcome.details.get("restarted", outcome.details.get("checkpoint")):
                    self.watcher.note(f"trial {number}: {why}")
            case Unfit(why=why):
                in_time = self.store.fail_trial(self.study, number, attempt, "unfit", why)
            case Lost(why=why, crashed=crashed):
                most = self.plan.config.attempts
                now = self.store.lose_trial(
                    self.study, number, attempt, why, last="quarantined" if crashed else "lost", most=most
                )
                in_time = now is not None
                if now == "waiting":
                    self.memory.waiting.add(number)
                    if self.climb:
                        self.climb.see(self.memory.trials[number])
                    self.watcher.note(f"trial {number} was lost and is tried again: {why}")
                    return
        if not in_time:
            self.watcher.note(f"trial {number} came back too late: another driver has taken it over")
            self._refresh(number)
            return
        if self.climb:
            self.climb.settled(number, job)
        self._ended(number, reused=False)

    def _ended(self, number: int, *, reused: bool) -> None:
        trial = self.store.trial(self.study, number)
        assert trial is not None
        self.memory.keep(trial)
        self._note_rungs(trial)
        self.memory.tell_end(trial)
        first = self.memory.best.first
        self.watcher.ended(
            trial,
            hypervolume=self.memory.best.hypervolume,
            best=None if first is None else self.memory.trials[first],
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
        if self.climb is not None and not self.stopping.asked:
            self.climb.close()

    def _check_front(self) -> None:
        """Run the front's networks end to end, since a sum over layers is only nearly their latency."""
        for trial in front(list(self.memory.trials.values()), self.study.axes):
            if "latency_ms_whole" in trial.costs or self.stopping.asked:
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
