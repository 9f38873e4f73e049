"""How a person or a machine stops a search: the first Ctrl-C lets running trials finish, all else stops at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):
    """A second Ctrl-C, or a request to terminate: stop at once."""


class Stopping:
    """Whether a stop was asked for, and whether it is one at once."""

    def __init__(self) -> None:
        self.asked = self.at_once = False

    def stop(self) -> None:
        """Stop at once; only the first call raises, so that a further signal does not break into the putting back."""
        if not self.at_once:
            self.asked = self.at_once = True
            raise Stopped

    @contextmanager
    def heeding(self, say: Callable[[], None]) -> Iterator[None]:
        """Heed signals until the end of the block; `say` is called at the first Ctrl-C. Both kinds keep every result."""

        def interrupted(_signal: int, _frame: FrameType | None) -> None:
            if self.asked:
                self.stop()
            else:
                self.asked = True
                # The signal may have come in the middle of a line: another thread waits for the end of it.
                threading.Thread(target=say).start()

        def terminated(_signal: int, _frame: FrameType | None) -> None:
            self.stop()

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = signal.signal(signal.SIGINT, interrupted), signal.signal(signal.SIGTERM, terminated)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, old[0])
            signal.signal(signal.SIGTERM, old[1])
