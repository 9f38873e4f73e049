"""Whoever looks on while a search runs."""

from typing import Protocol

from search_space.layout import Layout
from storage.records import ResultRecord, TrialRecord


class Watcher(Protocol):
    """Told of what happens, to show it; it changes nothing."""

    def started(self, trial: TrialRecord) -> None:
        """A trial was given to a worker."""

    def ended(
        self, trial: TrialRecord, *, hypervolume: float, best: TrialRecord | None, reused: bool
    ) -> None:
        """A trial ended, well or not."""

    def followed(self, trial: TrialRecord, *, hypervolume: float) -> None:
        """Another driver of the study ended a trial."""

    def repeated(self, trial: TrialRecord, result: ResultRecord) -> None:
        """A further seed of a finished trial came back; the trial has it already."""

    def skipped(self, layout: Layout, why: str) -> None:
        """A proposal was turned down before training."""

    def stopping(self, running: int) -> None:
        """The person asked to stop; so many trials are still running."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def tick(self, running: int) -> None:
        """Time passes."""
