"""The rungs of a running search: what each trial is told to do next, and where its checkpoint rests until then."""

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nas.config import Config, RungsConfig
from nas.front import values_of
from nas.plan import Plan
from nas.prospects import Prospects
from nas.rungs import Calibration, Ladder, Rules, Standing
from search_space.layout import from_json
from storage.place import place_of
from storage.records import Axis, StudyRecord, TrialRecord
from trainers.checkpoint import forget, sweep
from trainers.evaluate import Job, checkpoint_key

CACHE = "~/.cache/nas/checkpoints"


def rules_of(rungs: RungsConfig, seed: int) -> Rules | None:
    """How a study stops its trials; None where it lets all go to the end."""
    if not rungs.stop:
        return None
    return Rules(rungs=len(rungs.shares), keep=rungs.keep, chance=rungs.chance, trust=rungs.trust, seed=seed)


def folder_of(config: Config, study: str) -> str:
    """Where the checkpoints of a study rest: beside a database that is a file, else in the user's cache."""
    place = place_of(config.storage)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", study)[:40].strip("-")
    # A study in memory ends with its process, and so do its checkpoints.
    whose = f"{place.shown} {study}" + (f" {os.getpid()}" if place.kind == "memory" else "")
    own = f"{name}-{hashlib.sha256(whose.encode()).hexdigest()[:12]}"
    if config.checkpoints is not None:
        root = Path(config.checkpoints)
    elif place.path is not None:
        return str(place.path.with_name(f"{place.path.name}.checkpoints-{own}"))
    else:
        root = Path(CACHE)
    return str((root.expanduser() / own).resolve())


def learnt_of(trial: TrialRecord, axes: Sequence[Axis]) -> list[int]:
    """The places of the objectives that training tells; the others are among the costs."""
    return [place for place, axis in enumerate(axes) if axis.name not in trial.costs]


def standing_of(trial: TrialRecord, axes: Sequence[Axis], heading: int | None = None) -> Standing:
    """A trial as the rungs see it."""
    return Standing(
        number=trial.number,
        values={
            result.rung: tuple(values_of(replace(trial, results=(result,), repeats=()), axes))
            for result in trial.results
        },
        heading=heading,
        over=trial.state in ("unfit", "lost", "quarantined"),
    )


def ladder_of(rules: Rules, axes: Sequence[Axis], trials: Iterable[TrialRecord]) -> Ladder:
    """The rungs of trials as they are stored."""
    listed = list(trials)
    learnt = learnt_of(listed[0], axes) if listed else []
    return Ladder(rules, axes, learnt, [standing_of(trial, axes) for trial in listed])


def calibrations(ladder: Ladder) -> list[Calibration]:
    """What every rung is worth."""
    return [ladder.calibration(rung) for rung in range(ladder.rules.rungs)]


def climb_of(plan: Plan, study: StudyRecord) -> "Climb | None":
    """The rungs of a search that begins or goes on; None where it lets all go to the end."""
    rules = rules_of(plan.config.rungs, plan.config.seed)
    if rules is None:
        return None
    return Climb(plan=plan, study=study, rules=rules, folder=folder_of(plan.config, study.name))


@dataclass
class Climb:
    """Which trials go on, as far as the rungs of this search decide it. It reads no table and writes none."""

    plan: Plan
    study: StudyRecord
    rules: Rules
    folder: str
    standings: dict[int, Standing] = field(default_factory=dict)
    keys: dict[int, str] = field(default_factory=dict)
    """Of what each trial trains: layouts may differ at the target and be one at the proxy."""
    learnt: list[int] = field(default_factory=list)
    doubted: set[int] = field(default_factory=set)
    """Rungs that were not trusted when it was last said."""
    _ladder: Ladder | None = None
    _known: Prospects | None = None
    """What was found for earlier ladders, which holds for most of the next one."""

    def see(self, trial: TrialRecord, heading: int | None = None) -> None:
        """Take a trial as it now stands, on its way to a rung if it runs."""
        self.learnt = self.learnt or learnt_of(trial, self.study.axes)
        self.standings[trial.number] = standing_of(trial, self.study.axes, heading)
        self.keys[trial.number] = trial.evaluation_key
        self._ladder = None

    @property
    def ladder(self) -> Ladder:
        """The decisions on all that was seen."""
        if self._ladder is None:
            standings = list(self.standings.values())
            learnt = tuple(self.learnt)
            if self._known is None or self._known.learnt != learnt:
                self._known = Prospects(axes=self.study.axes, learnt=learnt)
            self._ladder = Ladder(self.rules, self.study.axes, self.learnt, standings, self._known)
        return self._ladder

    def job(self, trial: TrialRecord) -> Job:
        """What the trial is to do next: to the next rung that may stop it, from the one where it rests."""
        rung = self.standings[trial.number].rung
        return replace(
            self.plan.job(from_json(trial.layout.layers)),
            rung=self.ladder.goal(trial.number, rung),
            start=rung if rung >= 0 else None,
            checkpoints=self.folder,
        )

    def next(self, waiting: Collection[int]) -> int | None:
        """Who goes on before a new layout is tried; none of those that wait for a worker already.

        Those that may still join the front do not wait until no layout is left: the sampler learns more from their ends.
        """
        for going in (self.ladder.promotable, self.ladder.protected):
            for number in going():
                if number not in waiting:
                    return number
        return None

    def expected(self) -> Mapping[int, list[float]]:
        """The objectives at the end that are expected of those that were stopped, or are on their way from a rung."""
        guesses: dict[int, list[float]] = {}
        for rung in range(self.rules.rungs):
            there = [one for one in self.standings.values() if one.rung == rung and not one.over]
            values = self.ladder.expected(rung, [one.values[rung] for one in there]) if there else []
            guesses |= {one.number: own for one, own in zip(there, values, strict=True)}
        return guesses

    def doubts(self) -> list[str]:
        """What is to be said of rungs that are no longer trusted, or are again; said once."""
        now = {rung for rung, trusted in enumerate(self.ladder.trusted) if not trusted}
        shares = self.plan.budget.rungs
        lost = [
            f"the rung at {shares[rung] * 100:.0f} % of the steps says too little of the end "
            f"(Kendall τ below {self.rules.trust:g}): nobody is stopped there any more"
            for rung in sorted(now - self.doubted)
        ]
        found = [
            f"the rung at {shares[rung] * 100:.0f} % of the steps is trusted again"
            for rung in sorted(self.doubted - now)
        ]
        self.doubted = now
        return lost + found

    def settled(self, number: int, job: Job) -> None:
        """A trial's result is stored: the checkpoint that it went on from has done its work, unless another rests on it."""
        twins = [
            other
            for other, key in self.keys.items()
            if other != number and key == self.keys[number] and self.standings[other].rung == job.start
        ]
        if job.start is not None and not twins:
            forget(self.folder, checkpoint_key(job), job.start)

    def close(self) -> None:
        """The search is complete, and nobody is left at a rung who may still join the front: no checkpoint is needed."""
        sweep(self.folder)
