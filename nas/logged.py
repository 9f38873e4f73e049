"""A search that is looked at and logged: whatever its watcher is told also becomes a line of the study's log."""

import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from nas.config import Config
from nas.logs import Level, StudyLog, log_path, open_log
from nas.search import Ending
from nas.watcher import Watcher
from search_space.layout import Layout
from storage.records import ResultRecord, TrialRecord
from storage.store import Store

QUIET_S = 60.0
"""How often a search in which nothing ends says, at level debug, that it is alive."""


class LoggedWatcher:
    """Tells another watcher, and writes it down; implements nas.watcher.Watcher."""

    def __init__(self, shown: Watcher, log: StudyLog) -> None:
        self.shown, self.log = shown, log
        self.began = self.heard = time.monotonic()
        self.attempts: dict[int, int] = {}
        """By trial: the record that is handed over when one starts may be older than its last attempt."""

    def started(self, trial: TrialRecord) -> None:
        """A trial was given to a worker."""
        self.shown.started(trial)
        attempt = max(trial.attempts, self.attempts.get(trial.number, 0)) + 1
        self.attempts[trial.number] = attempt
        fields = _trial(trial) | {
            "attempt": attempt,
            "from_rung": trial.result.rung if trial.result else None,
        }
        self._write("info", "trial_started", fields)

    def ended(
        self, trial: TrialRecord, *, hypervolume: float, best: TrialRecord | None, reused: bool
    ) -> None:
        """A trial ended, well or not."""
        self.shown.ended(trial, hypervolume=hypervolume, best=best, reused=reused)
        self.attempts[trial.number] = trial.attempts
        well = trial.state in ("done", "pruned")
        fields = _trial(trial) | {"attempt": trial.attempts, "state": trial.state, "reused": reused}
        fields |= _result(trial.result) if well and trial.result is not None else {"why": trial.why}
        fields |= {"hypervolume": hypervolume, "best": None if best is None else best.number}
        self._write("info" if well else "warning", "trial_ended", fields)

    def followed(self, trial: TrialRecord, *, hypervolume: float) -> None:
        """Another driver of the study ended a trial, and logs it itself."""
        self.shown.followed(trial, hypervolume=hypervolume)
        fields = _trial(trial) | {"attempt": trial.attempts, "state": trial.state, "hypervolume": hypervolume}
        self._write("debug", "trial_followed", fields)

    def repeated(self, trial: TrialRecord, result: ResultRecord) -> None:
        """A further seed of a finished trial came back."""
        self.shown.repeated(trial, result)
        self._write("info", "seed_ended", _trial(trial) | _result(result))

    def skipped(self, layout: Layout, why: str) -> None:
        """A proposal was turned down before training."""
        self.shown.skipped(layout, why)
        self._write("debug", "proposal_skipped", {"layout": str(layout), "why": why})

    def stopping(self, running: int) -> None:
        """The person asked to stop."""
        self.shown.stopping(running)
        self._write("warning", "stop_asked", {"running": running})

    def note(self, text: str) -> None:
        """Something worth a line."""
        self.shown.note(text)
        self._write("info" if text.startswith("measuring") else "warning", "note", {"message": text})

    def tick(self, running: int) -> None:
        """Time passes."""
        self.shown.tick(running)
        if time.monotonic() - self.heard >= QUIET_S:
            self._write("debug", "waiting", {"running": running})

    def over(self, ending: Ending) -> None:
        """The search came to its end, or to that of this part of it."""
        fields = {
            "interrupted": ending.interrupted,
            "exhausted": ending.exhausted,
            "skipped": ending.skipped,
            "seconds": round(time.monotonic() - self.began, 3),
        }
        self._write("warning" if ending.interrupted else "info", "search_ended", fields)

    def _write(self, level: Level, event: str, fields: Mapping[str, Any]) -> None:
        self.heard = time.monotonic()
        self.log.write(level, event, fields)


@contextmanager
def logged(config: Config, store: Store, shown: Watcher) -> Iterator[LoggedWatcher]:
    """The watcher of one search; whatever ends it by an error is the last line, with its traceback."""
    path = log_path(config.log_file, config.storage, config.study)
    with open_log(path, config.log_level, study=config.study, storage=config.storage, warn=shown.note) as log:
        watcher = LoggedWatcher(shown, log)
        log.write(
            "info",
            "search_started",
            {
                "storage": store.shown_url,
                "trials": config.trials,
                "workers": config.workers,
                "pool": config.pool,
                "sampler": config.sampler,
                "seed": config.seed,
                "host": platform.node(),
                "process": os.getpid(),
            },
        )
        try:
            yield watcher
        except BaseException as error:
            said = str(error).splitlines()
            fields = {"error": type(error).__name__, "message": said[0] if said else ""}
            log.write("error", "search_failed", fields, error)
            raise


def _trial(trial: TrialRecord) -> dict[str, Any]:
    return {"trial": trial.number, "layout": trial.layout.text, "origin": trial.origin}


def _result(result: ResultRecord) -> dict[str, Any]:
    return {
        "rung": result.rung,
        "seed": result.seed,
        "quality": result.quality,
        "scores": dict(result.scores),
        "steps": result.steps,
        "tokens": result.tokens,
        "train_seconds": round(result.train_s, 3),
        "seconds": round(result.worker_s, 3),
    }
