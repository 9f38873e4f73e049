"""Trials in this very process, one after the other: the same seed gives the same study to the last bit."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from multiprocessing.connection import Connection, wait

from nas.workers.pool import run_job
from trainers.evaluate import Job
from trainers.outcome import Lost, Outcome


class InlinePool:
    """Runs the oldest job when asked for the next result."""

    capacity = 1

    def __init__(self) -> None:
        self.waiting: deque[tuple[int, Job]] = deque()
        self.isolated: set[int] = set()

    def isolate(self, number: int) -> None:
        """Run the next job of this number in a process of its own: one that ran it before died, and perhaps of it."""
        self.isolated.add(number)

    def submit(self, number: int, job: Job) -> None:
        """Queue a job."""
        self.waiting.append((number, job))

    def next_done(self, timeout_s: float) -> tuple[int, Outcome] | None:
        """Run the oldest job to its end, however long it takes."""
        del timeout_s
        if not self.waiting:
            return None
        number, job = self.waiting.popleft()
        if number not in self.isolated:
            return number, run_job(job)
        self.isolated.discard(number)
        return number, run_apart(job)

    def stop(self) -> None:
        """Forget what was queued."""
        self.waiting.clear()


def run_apart(job: Job) -> Outcome:
    """As `run_job`, in a process of its own: if it dies, the trial is lost and not the search. A bug is raised here."""
    # A fresh one: a copy of this process would hold its locks and none of the threads that release them.
    fresh = multiprocessing.get_context("spawn")
    receiver, sender = fresh.Pipe(duplex=False)
    process = fresh.Process(target=_answer, args=(job, sender), daemon=True)
    process.start()
    sender.close()
    try:
        answer: Outcome | Exception = receiver.recv()
    except EOFError:
        process.join()
        return Lost(why=f"the process that trained it died: {_ending(process.exitcode)}", crashed=True)
    finally:
        process.kill()
        process.join()
        receiver.close()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _answer(job: Job, sender: Connection) -> None:
    # Ctrl-C reaches all processes of a terminal, and is the search's to heed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        sender.send(run_job(job))
    except Exception as error:  # noqa: BLE001  raised again where the job was submitted
        sender.send(error)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _ending(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
