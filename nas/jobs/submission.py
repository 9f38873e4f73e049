"""From a configuration to a job: which database, which id, which entry point; a password is in none of them."""

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nas.config import Config, resolve
from nas.errors import Refused
from nas.jobs.bundle import CONFIGURATION, DATA, pack
from nas.jobs.cluster import MARK, AlreadyThere, JobRecord
from storage.place import place_of

URL_VARIABLE = "NAS_STORAGE_URL"
"""The variable of the job in which a URL without a secret travels; the entry point names it."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Jobs(Protocol):
    """What of a cluster is needed here."""

    def jobs(self) -> list[JobRecord]:
        """All jobs, the oldest first."""

    def submit(
        self, job_id: str, entrypoint: str, runtime_env: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> None:
        """Start a job; AlreadyThere if there is one of that id."""


@dataclass(frozen=True, kw_only=True)
class Database:
    """How a job comes by its database."""

    variable: str
    """The environment variable that holds the URL where the job runs."""
    url: str | None
    """What the variable is set to; None where the cluster sets it."""
    shown: str


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A search that is to become a job."""

    config: Config
    shipped: Mapping[str, Any]
    """The configuration as the job will read it, without its database."""
    database: Database
    data: Path | None
    """Text that travels with the job."""
    wheel: Path | None
    installed: bool
    """The cluster's own nas is run, and no code travels."""


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """The job that works on what was wanted."""

    id: str
    fresh: bool
    """It was made now; otherwise it was there."""
    status: str
    size: int
    beside: tuple[str, ...]
    """Other jobs that work on the same study of the same database."""


def database_of(url: str | None, variable: str | None, *, share_password: bool) -> Database:
    """The database of a job, from its URL or from the name of a variable of the cluster.

    Raises:
        Refused: neither or both are given, the file would vanish with the job, or a password would be seen.
        StorageError: the URL is not understood.
    """
    if variable is not None:
        if url is not None:
            raise Refused("--storage and --storage-env are both given: leave one out")
        if not _VARIABLE.fullmatch(variable):
            raise Refused(f"--storage-env {variable!r} is no name of an environment variable")
        return Database(variable=variable, url=None, shown=f"${variable}")
    if url is None:
        raise Refused(
            "a job needs a database that outlives it: name the cluster's variable that holds its URL with --storage-env,\n"
            "or give --storage postgresql://user@host/name or sqlite:////path/on/the/head/nas.db"
        )
    place = place_of(url)
    if place.kind == "memory":
        raise Refused(
            f"--storage {place.shown}: what is in memory ends with the job; name a file or a server"
        )
    if place.kind == "file" and not Path(url.partition("://")[2][1:]).is_absolute():
        raise Refused(
            f"--storage {place.shown} would lie in the job's own folder, which Ray clears away: "
            "write sqlite:////path/on/the/head/nas.db, with four slashes"
        )
    if place.secrets and not share_password:
        raise Refused(
            f"--storage {place.shown} holds a password, and whoever may ask the cluster for its jobs could read it: put the URL into a\n"
            "variable of the cluster (on Kubernetes from a Secret) and name that with --storage-env, or say --share-password"
        )
    return Database(variable=URL_VARIABLE, url=url, shown=place.shown)


def prepare(
    given: Mapping[str, Any], database: Database, *, wheel: Path | None, installed: bool
) -> tuple[Wanted, list[str]]:
    """What is to be done, and what the person should know of it.

    Raises:
        ValueError: the configuration is not valid.
        Refused: its text is not there, or both a wheel and the installed code are asked for.
    """
    if wheel is not None and installed:
        raise Refused("--wheel and --installed are both given: leave one out")
    own = {key: value for key, value in given.items() if key not in ("storage", "ray_address")}
    config, notes = resolve(own), []
    shipped: dict[str, Any] = own
    if config.pool != "inline":
        shipped |= {"pool": "ray", "ray_address": "auto"}
    data = None
    if config.data != "stdlib" and "bytes" in config.tasks:
        source = Path(config.data).expanduser()
        if source.exists():
            data = source
            shipped["data"] = f"{DATA}/{source.resolve().name}"
        elif source.is_absolute():
            notes.append(f"data: {source} is not here, so it must be on the cluster")
        else:
            raise Refused(f"data: there is no file or folder {source} here to travel with the job")
    if database.url is not None and database.url.startswith("sqlite"):
        notes.append(
            f"{database.shown} lies on the head: let it be on a disk that outlives the head, or use PostgreSQL"
        )
    if config.rungs.stop and config.checkpoints is None and not database.shown.startswith("sqlite"):
        notes.append(
            "stopped trials rest on the node that trained them, and start anew on another one: "
            "--set checkpoints=/a/folder/that/all/nodes/see lets them go on anywhere"
        )
    # From here on the text is the one that travels, wherever it came from.
    wanted = Wanted(
        config=resolve(shipped),
        shipped=shipped,
        database=database,
        data=data,
        wheel=wheel,
        installed=installed,
    )
    return wanted, notes


def base_id(wanted: Wanted, data_hash: str | None) -> str:
    """The same for the same search in the same database: the study's name, and a hash of everything that it is given."""
    meaning = {
        "config": wanted.config.model_dump(mode="json", exclude={"storage", "ray_address"}),
        "storage": wanted.database.shown,
        "data": data_hash,
    }
    digest = hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()[:12]
    name = re.sub(r"[^a-z0-9]+", "-", wanted.config.study.lower()).strip("-")[:40].strip("-")
    return f"nas-{name or 'study'}-{digest}"


def entrypoint(database: Database) -> str:
    """The command of a job; it holds names alone, which no shell reads as anything else."""
    return f"python -m nas search --config {CONFIGURATION} --storage-env {database.variable}"


def submit(wanted: Wanted, cluster: Jobs, *, version: str, again: bool) -> Submitted:
    """Make the job, or find the one that was made before: the same search is never twice on a cluster.

    A job that failed or was stopped is followed by another one, which goes on where it ended.
    """
    with tempfile.TemporaryDirectory(prefix="nas-job-") as folder:
        bundle = pack(
            Path(folder), wanted.shipped, wanted.data, wheel=wanted.wheel, installed=wanted.installed
        )
        base = base_id(wanted, bundle.data_hash)
        metadata = {
            MARK: version,
            "study": wanted.config.study,
            "storage": wanted.database.shown,
            "trials": str(wanted.config.trials),
        }
        environment = {} if wanted.database.url is None else {wanted.database.variable: wanted.database.url}
        runtime_env = {"working_dir": str(bundle.path), "env_vars": environment}
        while True:
            known = cluster.jobs()
            beside = tuple(job.id for job in known if _is_beside(job, base, metadata))
            last, following = _last_of(known, base)
            if last is not None and not (last.status in ("failed", "stopped") or (again and last.over)):
                return Submitted(id=last.id, fresh=False, status=last.status, size=bundle.size, beside=beside)
            try:
                cluster.submit(following, entrypoint(wanted.database), runtime_env, metadata)
            except AlreadyThere:
                # Somebody made it between our two questions.
                continue
            return Submitted(id=following, fresh=True, status="pending", size=bundle.size, beside=beside)


def _last_of(known: Sequence[JobRecord], base: str) -> tuple[JobRecord | None, str]:
    """The latest job of a search, and the id of the one that may follow it."""
    count, last = 0, None
    for job in known:
        head, dash, number = job.id.rpartition("-")
        place = 1 if job.id == base else int(number) if dash and head == base and number.isdigit() else 0
        if place > count:
            count, last = place, job
    return last, base if last is None else f"{base}-{count + 1}"


def _is_beside(job: JobRecord, base: str, metadata: Mapping[str, str]) -> bool:
    same = all(job.metadata.get(key) == metadata[key] for key in ("study", "storage"))
    return same and job.ours and not job.over and not (job.id == base or job.id.startswith(f"{base}-"))
