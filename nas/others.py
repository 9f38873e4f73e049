"""Other drivers at work on the same study: what they changed, and the trials of those that are gone."""

import time
from dataclasses import dataclass, field

from storage.leases import RENEWALS, Lease
from storage.records import StudyRecord, TrialRecord
from storage.store import Store

LOOK_S = 5.0
"""How often to ask for drivers that are gone: of one on this machine that is seen at once, of others by their lease."""


@dataclass
class Others:
    """Where a database is a file there are none, and nothing is asked."""

    store: Store
    study: StudyRecord
    lease: Lease
    seen: int = 0
    """The last event that was taken in."""
    looked: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.take_over()
        self.seen, _ = self.store.changed_trials(self.study, None)

    def take_over(self) -> None:
        """Let trials wait whose driver is gone."""
        self.store.requeue_abandoned(self.study)

    def changed(self) -> list[TrialRecord]:
        """Trials that something happened to since the last call, the own ones among them."""
        if self.lease.exclusive:
            return []
        if time.monotonic() - self.looked > min(LOOK_S, self.lease.lease_s / RENEWALS):
            self.take_over()
            self.looked = time.monotonic()
        self.seen, numbers = self.store.changed_trials(self.study, self.seen)
        return self.store.trials(self.study, numbers=numbers) if numbers else []

    def repeating(self) -> set[tuple[int, int]]:
        """Trial and seed of what other drivers train once more."""
        if self.lease.exclusive:
            return set()
        claims = self.store.claimed_repeats(self.study)
        return {(number, seed) for number, seed, driver in claims if driver != self.lease.driver_id}

    def claim_repeat(self, number: int, seed: int, *, most: int) -> bool:
        """Take a further seed, unless another driver was quicker, with this one or with the last of `most`."""
        return self.lease.exclusive or self.store.claim_repeat(
            self.study, number, seed, self.lease, most=most
        )
