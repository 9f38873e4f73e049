"""What a search remembers of its trials, and what sampler and rungs were told of them."""

from dataclasses import dataclass, field

from nas.best import Best
from nas.climb import Climb
from nas.front import values_of
from nas.samplers.sampler import Known, Proposal, Sampler
from search_space.layout import Layout
from storage.records import State, StudyRecord, TrialRecord

FAILED: tuple[State, ...] = ("unfit", "lost", "quarantined")
ENDED: tuple[State, ...] = ("done", "pruned", *FAILED)


@dataclass
class Memory:
    """Trials as they last stood in the tables, and the sampler's token of each."""

    study: StudyRecord
    sampler: Sampler
    climb: Climb | None = None
    """Where rungs may stop a trial."""
    trials: dict[int, TrialRecord] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    told: dict[int, list[float]] = field(default_factory=dict)
    """What the sampler was told to expect of trials that rest."""
    waiting: set[int] = field(default_factory=set)
    """Trials that wait for whichever driver takes them."""
    open: set[int] = field(default_factory=set)
    """Trials that wait or run, here or with another driver, as far as it was heard."""
    keys: set[str] = field(default_factory=set)
    """Of all layouts that a trial has."""

    def __post_init__(self) -> None:
        self.best = Best(self.study.axes)

    def keep(self, trial: TrialRecord) -> None:
        """Remember a trial as it now stands."""
        self.trials[trial.number] = trial
        self.keys.add(trial.layout.key)
        (self.open.add if trial.state in ("waiting", "running") else self.open.discard)(trial.number)
        self.best.see(trial)

    def fill(self, trials: list[TrialRecord]) -> None:
        """Remember a study that goes on."""
        for trial in trials:
            self.keep(trial)
            if trial.state == "waiting":
                self.waiting.add(trial.number)
            if self.climb:
                self.climb.see(trial)
        if self.climb:
            self.told = dict(self.climb.expected())
            # What was said before the search went on is not said again.
            self.climb.doubts()
        for trial in trials:
            self.tokens[trial.number] = self.sampler.learn(self._known_as(trial))

    def opened(self, trial: TrialRecord, proposal: Proposal) -> None:
        """A proposal became a trial."""
        self.keep(trial)
        self.tokens[trial.number] = proposal.token

    def take_in(self, trial: TrialRecord) -> bool:
        """Remember a trial as another driver left it; True where that driver ended it."""
        number, before = trial.number, self.trials.get(trial.number)
        if before == trial:
            return False
        self.keep(trial)
        (self.waiting.add if trial.state == "waiting" else self.waiting.discard)(number)
        if before is None:
            self.tokens[number] = self.sampler.learn(self._known_as(trial))
        if self.climb:
            self.climb.see(trial)
            if trial.state == "running":
                self.climb.see(trial, heading=self.climb.job(trial).goal)
        if trial.state not in ENDED or (before is not None and before.state in ENDED):
            return False
        if before is not None:
            self.tell_end(trial)
        return True

    def tell_end(self, trial: TrialRecord) -> None:
        """Tell the sampler how a trial ended, or what to expect of those that rest."""
        if trial.state == "pruned":
            self.tell_expected()
            return
        self.told.pop(trial.number, None)
        values = values_of(trial, self.study.axes) if trial.state == "done" else None
        self.sampler.tell(self.tokens[trial.number], values)

    def tell_expected(self) -> None:
        """Tell the sampler what the rungs let expect of trials that have not been trained to the end."""
        for number, values in (self.climb.expected() if self.climb else {}).items():
            if self.told.get(number) != values:
                self.sampler.tell(self.tokens[number], values)
                self.told[number] = values

    def knows(self, layout: Layout) -> bool:
        """Whether a trial has this layout, whatever became of it."""
        return layout.key in self.keys

    def _known_as(self, trial: TrialRecord) -> Known:
        values = values_of(trial, self.study.axes) if trial.state == "done" else None
        return Known(
            params=trial.params,
            attrs=trial.sampler_attrs,
            values=self.told.get(trial.number, values),
            failed=trial.state in FAILED,
        )
