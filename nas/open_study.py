"""Opening a study that must be there, for reading."""

from collections.abc import Iterator
from contextlib import contextmanager

from nas import defaults
from nas.errors import Refused
from search_space.notation import nearest
from storage.records import StudyRecord
from storage.store import Store


def storage_url(storage: str | None) -> str:
    """The database that a command means: the given one, or the default."""
    return storage or defaults.STORAGE


@contextmanager
def open_study(storage: str | None, study: str | None) -> Iterator[tuple[Store, StudyRecord]]:
    """A read-only store and the study in it.

    Raises:
        Refused: there is no study of that name; the message names those that are there.
        StorageError: the database cannot be read.
    """
    name = study or defaults.STUDY
    with Store.open(storage_url(storage), read_only=True) as store:
        record = store.study(name)
        if record is None:
            there = [known.name for known in store.studies()]
            listed = f"there are {', '.join(there[:8])}" if there else "it holds none; nas search makes one"
            raise Refused(f"no study {name!r} in {store.shown_url}{nearest(name, there)} ({listed})")
        yield store, record
