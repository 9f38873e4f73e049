"""The open list of tasks: a word to a task for given data."""

from collections.abc import Callable, Sequence

from search_space.notation import nearest
from trainers.tasks.bytes import Bytes
from trainers.tasks.mqar import Mqar, with_pairs
from trainers.tasks.needle import Needle
from trainers.tasks.parity import Parity
from trainers.tasks.task import Task

TASKS: dict[str, Callable[[str, Sequence[int]], Task]] = {
    "mqar": lambda _, pairs: with_pairs(pairs) if pairs else Mqar(),
    "bytes": lambda data, _: Bytes(data=data),
    "parity": lambda _data, _pairs: Parity(),
    "needle": lambda _data, _pairs: Needle(),
}
"""By name, from the data and the numbers of pairs; each task takes what concerns it."""


def make_task(name: str, data: str, pairs: Sequence[int] = ()) -> Task:
    """The task of that name on that data; raises ValueError for an unknown name, or pairs for a task that has none."""
    if name not in TASKS:
        raise ValueError(f"no task {name!r}{nearest(name, TASKS)} (there are {', '.join(TASKS)})")
    if pairs and name != "mqar":
        raise ValueError(f"task {name} has no pairs: only mqar does")
    return TASKS[name](data, pairs)
