"""Which layout is trained once more, with a seed of its own: where another seed says most about the front.

At first nobody knows how far seeds lie apart, and the front's layouts are repeated in turn, the best ones first. Then
those whose place on the front is least sure, as long as few seeds speak for them.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from nas.config import MOST_SEED
from nas.front import finished, front
from nas.noise import chances
from nas.others import Others
from nas.plan import Plan
from nas.results import records_of
from nas.workers.pool import Pool
from search_space.layout import from_json
from storage.records import Axis, ResultRecord, StudyRecord, TrialRecord
from storage.store import Store
from trainers.outcome import Lost, Measured, Outcome, Unfit

FIRST = 3
"""Repeats before the spread of seeds is believed."""
SURE = 0.01
"""A chance so near to 0 or 1 is not worth another training while another one is less sure."""


@dataclass(frozen=True, order=True)
class Repeat:
    """A trial's number and the seed that it is to be trained with."""

    number: int
    seed: int


def next_repeat(
    trials: Sequence[TrialRecord],
    axes: Sequence[Axis],
    *,
    most: int,
    under_way: Collection[Repeat] = (),
    given_up: Collection[Repeat] = (),
) -> Repeat | None:
    """The next training with a new seed; None when there are `most`, those under way included, or no front."""
    done = finished(trials)
    there = sum(len(trial.repeats) for trial in done) + len(under_way)
    if there + len(given_up) >= most:
        return None
    best = front(done, axes)
    if not best:
        return None
    used = {trial.number: len(trial.repeats) for trial in done}
    for repeat in (*under_way, *given_up):
        used[repeat.number] += 1
    likely = chances(done, axes) if there - len(under_way) >= FIRST else {}
    unsure = {number: chance for number, chance in likely.items() if SURE < chance < 1 - SURE}
    if unsure:
        # The variance of a yes or no, and how much of it one more seed takes away.
        worth = {
            number: chance * (1 - chance) / ((1 + used[number]) * (2 + used[number]))
            for number, chance in unsure.items()
        }
        number = max(worth, key=lambda one: (worth[one], -one))
    else:
        number = min(best, key=lambda trial: used[trial.number]).number
    trial = next(one for one in done if one.number == number)
    return Repeat(number, _new_seed(trial, number, (*under_way, *given_up)))


def _new_seed(trial: TrialRecord, number: int, further: Collection[Repeat]) -> int:
    """The first seed above the study's own that this trial was not trained with."""
    assert trial.result is not None
    taken = {trial.result.seed, *(result.seed for result in trial.repeats)}
    taken |= {repeat.seed for repeat in further if repeat.number == number}
    seed = trial.result.seed
    while seed in taken:
        seed = (seed + 1) % (MOST_SEED + 1)
    return seed


def result_of(outcome: Measured | Unfit, seed: int, first: ResultRecord) -> ResultRecord:
    """What a repeat brought. A seed whose network left the finite range scores nothing: that too is the layout's own."""
    if isinstance(outcome, Measured):
        return records_of(outcome, range(outcome.rung), seed)[-1]
    return ResultRecord(
        rung=first.rung,
        quality=0.0,
        scores=dict.fromkeys(first.scores, 0.0),
        details={"unfit": outcome.why},
        steps=0,
        tokens=0,
        train_s=0.0,
        worker_s=0.0,
        seed=seed,
    )


@dataclass
class Repeats:
    """The repeats of a running search. Pools know them by numbers below 0, which no trial has."""

    plan: Plan
    store: Store
    study: StudyRecord
    pool: Pool
    others: Others
    keep: Callable[[TrialRecord], None]
    """Remembers a trial as it then is."""
    follow: Callable[[], None]
    """Takes in what other drivers did."""
    tell: Callable[[TrialRecord, ResultRecord], None]
    """Told of each that ended, with the trial as it then is."""
    note: Callable[[str], None]
    under_way: dict[int, Repeat] = field(default_factory=dict)
    lost: dict[Repeat, int] = field(default_factory=dict)
    """How often the machine lost one."""

    def begin(self, trials: Mapping[int, TrialRecord]) -> bool:
        """Begin the next one, or take its result if something trained it before; False if there is none."""
        repeat = self._next(list(trials.values()))
        if repeat is None:
            return False
        if not self.others.claim_repeat(repeat.number, repeat.seed, most=self.plan.config.most_repeats):
            # Whoever was quicker may have been so with another trial.
            self.follow()
            return True
        layout = from_json(trials[repeat.number].layout.layers)
        known = self.store.find_result(self.plan.evaluation_key(layout, repeat.seed))
        if known is not None:
            details = {**known.details, "new_steps": 0}
            known = replace(known, rung=len(self.plan.budget.rungs), details=details)
            self._write(repeat, known, trials)
            return True
        ticket = next(-1 - free for free in count() if -1 - free not in self.under_way)
        self.under_way[ticket] = repeat
        self.pool.submit(ticket, replace(self.plan.job(layout), seed=repeat.seed))
        return True

    def settle(self, ticket: int, outcome: Outcome, trials: Mapping[int, TrialRecord]) -> None:
        """Write down what came back."""
        repeat = self.under_way.pop(ticket)
        first = trials[repeat.number].result
        assert first is not None
        if isinstance(outcome, Lost) or (isinstance(outcome, Unfit) and not outcome.diverged):
            # It was trained within its limits before: that it was not this time says nothing of the layout.
            self.lost[repeat] = self.lost.get(repeat, 0) + 1
            again = " and is tried again" if self.lost[repeat] < self.plan.config.attempts else ""
            self.note(f"seed {repeat.seed} of trial {repeat.number} was lost{again}: {outcome.why}")
            return
        self.lost.pop(repeat, None)
        self._write(repeat, result_of(outcome, repeat.seed, first), trials)

    def _next(self, trials: Sequence[TrialRecord]) -> Repeat | None:
        """What was lost and may be tried again, before anything new."""
        running = set(self.under_way.values())
        elsewhere = {Repeat(number, seed) for number, seed in self.others.repeating()}
        for repeat, times in self.lost.items():
            if times < self.plan.config.attempts and repeat not in running:
                return repeat
        given_up = [repeat for repeat, times in self.lost.items() if times >= self.plan.config.attempts]
        most = self.plan.config.most_repeats
        return next_repeat(
            trials, self.study.axes, most=most, under_way=running | elsewhere, given_up=given_up
        )

    def _write(self, repeat: Repeat, result: ResultRecord, trials: Mapping[int, TrialRecord]) -> None:
        layout = from_json(trials[repeat.number].layout.layers)
        key = self.plan.evaluation_key(layout, repeat.seed)
        self.store.add_repeat(self.study, repeat.number, key, result)
        trial = self.store.trial(self.study, repeat.number)
        assert trial is not None
        self.keep(trial)
        self.tell(trial, result)
