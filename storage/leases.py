"""A driver's lease on a study: begun, renewed by a thread of its own, ended; begun anew where it was given up meanwhile."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from storage import drivers
from storage.engine import Database
from storage.errors import StorageError
from storage.process import name_of_this
from storage.records import StudyRecord

LEASE_S = 60.0
"""How long a driver that says nothing is believed to be alive."""
RENEWALS = 4
"""How often a lease is renewed in its time."""


class Lease:
    """A driver's place among those that work on a study."""

    def __init__(self, database: Database, study: StudyRecord, *, lease_s: float) -> None:
        self.exclusive = database.place.kind != "server"
        """Whether no other driver can be at work: a database that is a file has one writer."""
        self.lease_s = lease_s
        self._database, self._study = database, study
        self._id: int | None = None
        self._turn = threading.Lock()

    @property
    def driver_id(self) -> int:
        """The number that claims are made under; another one after the lease was lost."""
        assert self._id is not None
        return self._id

    def begin(self) -> None:
        """Take a place; where there can be no other driver, the places of all before it are given up."""
        with self._turn, self._database.writing() as connection:
            if self.exclusive:
                drivers.end_all(connection, self._study)
            name = name_of_this()
            self._id = drivers.begin(connection, self._study, name=name, lease_s=self.lease_s)

    def renew(self) -> bool:
        """Believed for another lease; False where it was given up, and a new place was taken: old claims are void."""
        with self._database.writing() as connection:
            if drivers.renew(connection, self.driver_id, self.lease_s):
                return True
        self.begin()
        return False

    def end(self) -> None:
        """Give the place back."""
        with self._turn, self._database.writing() as connection:
            drivers.end(connection, self._study, self.driver_id)


@contextmanager
def leased(database: Database, study: StudyRecord, *, lease_s: float) -> Iterator[Lease]:
    """A lease that is renewed until the end of the block."""
    lease = Lease(database, study, lease_s=lease_s)
    over = threading.Event()

    def keep() -> None:
        while not over.wait(lease_s / RENEWALS):
            # A server that is away for a while is asked again; whoever writes meets the error himself.
            with suppress(StorageError):
                lease.renew()

    lease.begin()
    keeper = threading.Thread(target=keep, name="lease", daemon=True)
    keeper.start()
    try:
        yield lease
    finally:
        over.set()
        keeper.join()
        # What could not be said is found out when the lease runs out.
        with suppress(StorageError):
            lease.end()
