"""What a job brings along, its id, its database, and which clusters are refused; no head of Ray is needed."""

import json
import random
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from nas.errors import Refused
from nas.jobs import bundle
from nas.jobs.address import Head, find_head, read_address, refuse_open
from nas.jobs.cluster import MARK, AlreadyThere, JobRecord
from nas.jobs.submission import Submitted, Wanted, database_of, entrypoint, prepare, submit

SECRET = "canary-pass-word"
WITH_SECRET = f"postgresql://ann:{SECRET}@db.example/nas"


@dataclass
class Jobs:
    """A job server in memory, which keeps the archive that it was sent."""

    known: list[JobRecord] = field(default_factory=list)
    sent: list[dict[str, Any]] = field(default_factory=list)
    raced: bool = False

    def jobs(self) -> list[JobRecord]:
        return list(self.known)

    def submit(
        self, job_id: str, command: str, runtime_env: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> None:
        if any(job.id == job_id for job in self.known):
            raise AlreadyThere
        made = JobRecord(
            id=job_id,
            status="pending",
            metadata=metadata,
            started_ms=len(self.known),
            ended_ms=None,
            exit_code=None,
            message="",
        )
        self.known.append(made)
        if self.raced:
            self.raced = False
            raise AlreadyThere
        packed = Path(runtime_env["working_dir"]).read_bytes()
        self.sent.append(
            {
                "id": job_id,
                "command": command,
                "env_vars": runtime_env["env_vars"],
                "metadata": metadata,
                "packed": packed,
            }
        )

    def end(self, status: str) -> None:
        last = self.known[-1]
        self.known[-1] = JobRecord(**{**vars(last), "status": status, "ended_ms": 1})


@pytest.fixture
def given(tiny: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return tiny()


def wanted_of(
    given: Mapping[str, Any], url: str | None = "postgresql://ann@db.example/nas", variable: str | None = None
) -> Wanted:
    database = database_of(None if variable else url, variable, share_password=False)
    return prepare(given, database, wheel=None, installed=False)[0]


def sent(wanted: Wanted, cluster: Jobs, *, again: bool = False) -> Submitted:
    return submit(wanted, cluster, version="1", again=again)


def test_the_same_search_is_one_job(given: dict[str, Any]) -> None:
    cluster = Jobs()
    first = sent(wanted_of(given), cluster)
    assert first.fresh and first.id.startswith("nas-tiny-")
    for status in ("pending", "running", "succeeded"):
        cluster.end(status)
        second = sent(wanted_of(given), cluster)
        assert (second.id, second.fresh, second.status) == (first.id, False, status)
    assert [job["id"] for job in cluster.sent] == [first.id]
    assert sent(wanted_of(given), cluster, again=True).id == f"{first.id}-2"


def test_a_job_that_failed_or_was_stopped_is_followed_by_another_one(given: dict[str, Any]) -> None:
    cluster = Jobs()
    first = sent(wanted_of(given), cluster)
    for count, status in enumerate(("failed", "stopped"), start=2):
        cluster.end(status)
        assert sent(wanted_of(given), cluster) == Submitted(
            id=f"{first.id}-{count}", fresh=True, status="pending", size=first.size, beside=()
        )
    assert not sent(wanted_of(given), cluster).fresh


def test_two_who_submit_at_the_same_moment_have_one_job(given: dict[str, Any]) -> None:
    cluster = Jobs(raced=True)
    found = sent(wanted_of(given), cluster)
    assert not found.fresh and [job.id for job in cluster.known] == [found.id]


def test_another_configuration_or_database_is_another_job_and_a_sibling_is_named(
    given: dict[str, Any],
) -> None:
    cluster = Jobs()
    first = sent(wanted_of(given), cluster)
    more = sent(wanted_of({**given, "trials": 7}), cluster)
    assert more.id != first.id and more.beside == (first.id,)
    elsewhere = sent(wanted_of(given, "postgresql://ann@db.example/other"), cluster)
    assert elsewhere.id not in (first.id, more.id) and elsewhere.beside == ()


def test_what_travels_runs_by_itself(given: dict[str, Any], tmp_path: Path) -> None:
    text = tmp_path / "texts"
    (text / "deep").mkdir(parents=True)
    (text / "a.txt").write_text("a" * 2000)
    (text / "deep" / "b.txt").write_text("b" * 2000)
    (text / ".hidden").write_text("secret of the folder")
    cluster = Jobs()
    tasks = {**given["tasks"], "bytes": {"steps": 1}}
    wanted = wanted_of({**given, "tasks": tasks, "data": str(text), "storage": "sqlite:///mine.db"})
    sent(wanted, cluster)
    (tmp_path / "job.zip").write_bytes(cluster.sent[0]["packed"])
    with zipfile.ZipFile(tmp_path / "job.zip") as opened:
        names = set(opened.namelist())
        configuration = json.loads(opened.read(bundle.CONFIGURATION))
    assert {f"{name}/__init__.py" for name in bundle.PACKAGES} <= names and "nas/__main__.py" in names
    assert "dashboards/templates/base.html" in names and "kernels/scalar_decay/triton.py" in names
    assert {name for name in names if name.startswith(bundle.DATA)} == {
        f"{bundle.DATA}/texts/a.txt",
        f"{bundle.DATA}/texts/deep/b.txt",
    }
    assert not any("__pycache__" in name for name in names)
    assert configuration["data"] == f"{bundle.DATA}/texts" and "storage" not in configuration
    assert (configuration["pool"], configuration["ray_address"]) == ("ray", "auto")
    again = Jobs()
    sent(wanted, again)
    assert again.sent[0]["packed"] == cluster.sent[0]["packed"]
    shutil.copytree(text, tmp_path / "elsewhere" / "texts")
    moved = Jobs()
    sent(wanted_of({**given, "tasks": tasks, "data": str(tmp_path / "elsewhere" / "texts")}), moved)
    assert moved.sent[0]["id"] == cluster.sent[0]["id"]
    (text / "a.txt").write_text("c" * 2000)
    changed = Jobs()
    sent(wanted, changed)
    assert changed.sent[0]["id"] != cluster.sent[0]["id"]


def test_text_that_is_too_large_is_refused_with_the_limit(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "MOST_BYTES", 1 << 20)
    path = tmp_path / "large.txt"
    path.write_bytes(random.Random(0).randbytes(2 << 20))
    tasks = {"bytes": {"steps": 1}}
    with pytest.raises(Refused, match=r"at most 1 MiB, packed;\nput the text where every node sees it"):
        sent(wanted_of({**given, "tasks": tasks, "data": str(path)}), Jobs())


def test_text_that_is_not_here_is_the_clusters_or_nobodys(given: dict[str, Any]) -> None:
    tasks = {"bytes": {"steps": 1}}
    database = database_of(None, "URL", share_password=False)
    far = prepare({**given, "tasks": tasks, "data": "/far/away"}, database, wheel=None, installed=False)
    assert far[0].data is None and far[0].shipped["data"] == "/far/away"
    assert any("must be on the cluster" in note for note in far[1])
    with pytest.raises(Refused, match="no file or folder far/away here"):
        prepare({**given, "tasks": tasks, "data": "far/away"}, database, wheel=None, installed=False)


def test_a_wheel_or_the_clusters_own_code(given: dict[str, Any], tmp_path: Path) -> None:
    wheel = tmp_path / "nas.whl"
    with zipfile.ZipFile(wheel, "w") as made:
        for name in bundle.PACKAGES:
            made.writestr(f"{name}/__init__.py", '"""Of the wheel."""')
    assert dict(bundle.code_files(wheel))["nas/__init__.py"] == b'"""Of the wheel."""'
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr("other/__init__.py", "")
    with pytest.raises(Refused, match="is not a wheel of nas"):
        list(bundle.code_files(wheel))
    wheel.write_bytes(b"no archive")
    with pytest.raises(Refused, match="it is no archive"):
        list(bundle.code_files(wheel))
    database = database_of(None, "URL", share_password=False)
    with pytest.raises(Refused, match="leave one out"):
        prepare(given, database, wheel=wheel, installed=True)
    cluster = Jobs()
    sent(prepare(given, database, wheel=None, installed=True)[0], cluster)
    (tmp_path / "job.zip").write_bytes(cluster.sent[0]["packed"])
    with zipfile.ZipFile(tmp_path / "job.zip") as opened:
        assert opened.namelist() == [bundle.CONFIGURATION]


@pytest.mark.parametrize(
    ("url", "why"),
    [
        (None, "needs a database that outlives it"),
        ("sqlite://", "ends with the job"),
        ("sqlite:///nas.db", "with four slashes"),
        (WITH_SECRET, "name that with --storage-env, or say --share-password"),
        (f"postgresql://db.example/nas?password={SECRET}", "holds a password"),
    ],
)
def test_databases_that_are_no_good_to_a_job(url: str | None, why: str) -> None:
    with pytest.raises(Refused, match=why) as caught:
        database_of(url, None, share_password=False)
    assert SECRET not in str(caught.value) and len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize("name", ["a b", "1A", "A;rm", "$X", ""])
def test_a_variable_is_a_name(name: str) -> None:
    with pytest.raises(Refused, match="no name of an environment variable"):
        database_of(None, name, share_password=False)


def test_a_password_is_in_no_command_no_metadata_and_no_archive(given: dict[str, Any]) -> None:
    cluster = Jobs()
    database = database_of(WITH_SECRET, None, share_password=True)
    own = {**given, "storage": WITH_SECRET}
    sent(prepare(own, database, wheel=None, installed=True)[0], cluster)
    [job] = cluster.sent
    assert job["env_vars"] == {"NAS_STORAGE_URL": WITH_SECRET}
    assert job["command"] == entrypoint(database)
    assert job["command"] == "python -m nas search --config nas-job.yaml --storage-env NAS_STORAGE_URL"
    assert SECRET not in job["command"] + str(job["metadata"]) + job["id"]
    assert SECRET.encode() not in job["packed"]
    assert job["metadata"]["storage"] == "postgresql://ann:***@db.example/nas"
    named = Jobs()
    sent(wanted_of(own, variable="DB_URL"), named)
    assert named.sent[0]["env_vars"] == {} and named.sent[0]["command"].endswith("--storage-env DB_URL")
    assert named.sent[0]["metadata"] == {
        MARK: "1",
        "study": "tiny",
        "storage": "$DB_URL",
        "trials": "6",
    }


@contextmanager
def answering(code: int, body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("code", "body", "guarded"),
    [
        (200, b'{"authentication_mode": "token"}', True),
        (200, b'{"authentication_mode": "disabled"}', False),
        (401, b"", True),
        (404, b"", False),
    ],
)
def test_a_head_says_whether_it_asks_for_a_token(code: int, body: bytes, guarded: bool) -> None:
    with answering(code, body) as address:
        assert find_head(address + "/") == Head(address=address, guarded=guarded, loopback=True)


@pytest.mark.parametrize(("code", "body"), [(200, b"<html>"), (200, b"[1]"), (200, b"{}"), (502, b"")])
def test_something_else_than_a_head_is_refused(code: int, body: bytes) -> None:
    with answering(code, body) as address, pytest.raises(Refused, match=address) as caught:
        find_head(address)
    assert caught.value.code == 2


def test_a_dead_address_is_said_in_two_lines(
    refused: Callable[..., str], config_file: Callable[..., str]
) -> None:
    commands = (("jobs",), ("logs", "x"), ("cancel", "x"), ("submit", config_file(), "--storage-env", "X"))
    for command in commands:
        said = refused(*command, "--address", "http://127.0.0.1:9")
        assert "no head of Ray answers at http://127.0.0.1:9: Connection refused" in said


@pytest.mark.parametrize(
    "address", ["head:8265", "ray://head:10001", "auto", "http://", "http://h:no", "http://h/?a=b"]
)
def test_what_is_no_address_of_a_job_server(address: str) -> None:
    with pytest.raises(Refused, match="write it like http://head:8265"):
        read_address(address)


def test_a_user_in_an_address_is_masked() -> None:
    with pytest.raises(Refused, match="holds a user") as caught:
        read_address(f"http://ann:{SECRET}@head:8265")
    assert SECRET not in str(caught.value)


def test_rays_own_variables_name_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.5:6379")
    assert read_address(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://b:8265")
    assert read_address(None) == "http://b:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://a:8265/")
    assert read_address(None) == "http://a:8265"
    assert read_address("https://c") == "https://c"


def test_an_open_cluster_elsewhere_is_refused() -> None:
    away = Head(address="http://10.0.0.5:8265", guarded=False, loopback=False)
    with pytest.raises(Refused, match="takes jobs from everybody"):
        refuse_open(away, insecure=False)
    refuse_open(away, insecure=True)
    refuse_open(Head(address="http://127.0.0.1:8265", guarded=False, loopback=True), insecure=False)
    refuse_open(Head(address="http://10.0.0.5:8265", guarded=True, loopback=False), insecure=False)


def test_submit_refuses_what_the_search_would(
    refused: Callable[..., str], config_file: Callable[..., str]
) -> None:
    rest = ("--storage-env", "X", "--address", "http://127.0.0.1:9")
    assert "unknown key trails" in refused("submit", config_file({"trails": 3}), *rest)
    assert "no sampler" in refused("submit", config_file({"sampler": "nobody"}), *rest)
    assert "cannot be read" in refused("submit", "nowhere.yaml", *rest)
    assert "leave one out" in refused("submit", config_file(), *rest, "--storage", "sqlite:////a.db")


def test_a_search_reads_its_database_from_a_variable(
    run: Callable[..., Any],
    refused: Callable[..., str],
    config_file: Callable[..., str],
    url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = config_file({"trials": 1})
    monkeypatch.setenv("MY_DATABASE", url)
    assert run("search", "--config", path, "--storage-env", "MY_DATABASE", "--json").json["storage"] == url
    assert "leave one out" in refused("search", "--storage-env", "MY_DATABASE", "--storage", url)
    monkeypatch.setenv("MY_DATABASE", "")
    assert "there is no such environment variable" in refused("search", "--storage-env", "MY_DATABASE")
