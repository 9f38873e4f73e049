"""A cluster's job server, asked through Ray's SDK; what goes wrong there is a line or two for the person."""

import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from nas.errors import EXIT_INTERNAL, Refused
from nas.jobs.address import Head
from search_space.notation import nearest

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

OVER = ("succeeded", "failed", "stopped")
MARK = "nas"
"""The key of a job's metadata by which ours are known."""
_GIVEN_ADDRESS = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """A job as the cluster knows it. Whether its trials are there, the study's tables alone say."""

    id: str
    status: str
    """pending, running, succeeded, failed or stopped."""
    metadata: Mapping[str, str]
    started_ms: int | None
    """Unix time."""
    ended_ms: int | None
    exit_code: int | None
    message: str

    @property
    def ours(self) -> bool:
        """Whether `nas submit` made it."""
        return MARK in self.metadata

    @property
    def over(self) -> bool:
        """Whether it has ended, well or not."""
        return self.status in OVER


class AlreadyThere(Exception):
    """A job of this id was made before."""


class Cluster:
    """The jobs of one cluster.

    Raises:
        Refused: the head cannot be reached, refuses the token, or knows no such job.
    """

    def __init__(self, head: Head) -> None:
        self.head = head
        if head.guarded:
            # Ray's own switch, read when Ray is imported: without it Ray would not send the token that is there.
            os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        logging.getLogger("ray").setLevel(logging.ERROR)
        try:
            from ray.job_submission import JobSubmissionClient
        except ImportError as error:
            raise Refused(
                f"Ray's jobs need a package that is not installed: {error}", EXIT_INTERNAL
            ) from error
        with self._asking(), _without(_GIVEN_ADDRESS):
            self.client: Any = JobSubmissionClient(head.address)

    def jobs(self) -> list[JobRecord]:
        """All jobs, ours and others', the oldest first."""
        with self._asking():
            found = [_record(job) for job in self.client.list_jobs() if job.submission_id]
        return sorted(found, key=lambda job: job.started_ms or 0)

    def job(self, job_id: str) -> JobRecord:
        """One job."""
        return _record(self._of(job_id, self.client.get_job_info))

    def submit(
        self, job_id: str, entrypoint: str, runtime_env: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> None:
        """Start a job under an id; raises AlreadyThere where the cluster had one of that id."""
        with self._asking():
            try:
                self.client.submit_job(
                    submission_id=job_id,
                    entrypoint=entrypoint,
                    runtime_env=dict(runtime_env),
                    metadata=dict(metadata),
                )
            except RuntimeError as error:
                if "already exists" in str(error):
                    raise AlreadyThere from error
                raise

    def log(self, job_id: str) -> str:
        """Everything that a job has written so far."""
        text: str = self._of(job_id, self.client.get_job_logs)
        return text

    def follow(self, job_id: str) -> AsyncIterator[str]:
        """What a job writes, from its first line to its end."""
        self.job(job_id)
        lines: AsyncIterator[str] = self.client.tail_job_logs(job_id)
        return lines

    def stop(self, job_id: str) -> bool:
        """Ask a job to end; False where it had ended already."""
        stopped: bool = self._of(job_id, self.client.stop_job)
        return stopped

    def _of(self, job_id: str, ask: Callable[[str], T]) -> T:
        try:
            with self._asking():
                return ask(job_id)
        except UnknownJob:
            known = [job.id for job in self.jobs()]
            there = f"there are {', '.join(known[-6:])}" if known else "it has none"
            raise Refused(
                f"no job {job_id!r} at {self.head.address}{nearest(job_id, known)} ({there}); a cluster forgets its jobs "
                "when its head restarts"
            ) from None

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """While the head is asked; turns what Ray's SDK raises into Refused."""
        from ray.exceptions import AuthenticationError

        where = self.head.address
        try:
            yield
        except AuthenticationError as error:
            if str(error).startswith("Authentication failed"):
                raise Refused(
                    f"{where} refuses the token: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token must hold the one "
                    "that its head was started with"
                ) from None
            raise Refused(
                f"{where} asks for a token and none was found: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file "
                "that holds it\n(on the head, ray get-auth-token prints it; on Kubernetes it is in the cluster's Secret)"
            ) from None
        except OSError as error:
            raise Refused(f"the connection to {where} failed: {_first_line(error)}; try again") from error
        except RuntimeError as error:
            text = str(error)
            if "status code 404" in text and "does not exist" in text:
                raise UnknownJob from error
            raise Refused(f"{where} could not do it: {_last_line(text)}", EXIT_INTERNAL) from error


class UnknownJob(Exception):
    """The cluster knows no job of that id."""


def _record(job: "JobDetails") -> JobRecord:
    return JobRecord(
        id=str(job.submission_id),
        status=job.status.value.lower(),
        metadata=job.metadata or {},
        started_ms=job.start_time,
        ended_ms=job.end_time,
        exit_code=job.driver_exit_code,
        message=_first_line(job.message or ""),
    )


def _first_line(text: object) -> str:
    return next((line.strip() for line in str(text).splitlines() if line.strip()), "")


def _last_line(text: str) -> str:
    """A server's traceback ends with what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" .")]
    return lines[-1] if lines else "it gave no reason"


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    """Without variables that Ray's SDK would obey before the address that a person gave."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
