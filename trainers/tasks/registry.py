"""The open list of tasks: a word to a task for given data."""

from collections.abc import Callable

from search_space.notation import nearest
from trainers.tasks.bytes import Bytes
from trainers.tasks.mqar import Mqar
from trainers.tasks.task import Task

TASKS: dict[str, Callable[[str], Task]] = {
    "mqar": lambda data: Mqar(),  # noqa: ARG005
    "bytes": lambda data: Bytes(data=data),
}


def make_task(name: str, data: str) -> Task:
    """The task of that name on that data; raises ValueError for an unknown name."""
    if name not in TASKS:
        raise ValueError(f"no task {name!r}{nearest(name, TASKS)} (there are {', '.join(TASKS)})")
    return TASKS[name](data)
