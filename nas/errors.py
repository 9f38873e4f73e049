"""Endings of a command that are not success, each with the exit code that scripts can rely on."""

from collections.abc import Iterator
from contextlib import contextmanager

EXIT_INTERNAL = 1
EXIT_USAGE = 2
EXIT_STORAGE = 3
EXIT_NOTHING = 4
EXIT_INTERRUPTED = 5


class Refused(Exception):
    """The command cannot do what was asked; the message is one or two lines for the person who asked."""

    def __init__(self, message: str, code: int = EXIT_USAGE) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def reading_input() -> Iterator[None]:
    """While what a person gave is read, a ValueError is theirs to mend and not a bug of ours."""
    try:
        yield
    except ValueError as error:
        raise Refused(str(error)) from error
