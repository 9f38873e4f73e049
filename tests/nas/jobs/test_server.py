"""`nas submit`, `jobs`, `logs` and `cancel` against a real head of Ray on this machine."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.errors import StorageError
from storage.store import Store

pytestmark = pytest.mark.slow
TOKEN = "a-token-of-the-tests-0123456789abcdef"
ENDLESS = {"tasks": {"mqar": {"steps": 2_000_000, "batch": 4, "learning_rates": [0.01]}}}


@pytest.fixture
def database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/job.db"


def states(url: str) -> list[str]:
    try:
        store = Store.open(url, read_only=True)
    except StorageError:  # No file yet, or one in which the job has not made its tables.
        return []
    with store:
        study = store.study("tiny")
        return [] if study is None else [trial.state for trial in store.trials(study)]


def until(there: Callable[[], bool], what: Callable[[], str], wait_s: float = 120) -> None:
    end = time.monotonic() + wait_s
    while not there():
        assert time.monotonic() < end, what()
        time.sleep(0.5)


def test_a_job_runs_is_found_once_and_can_be_cancelled(
    head: Any, nas: Callable[..., Any], config_file: Callable[..., str], database: str
) -> None:
    command = (
        "submit", config_file({"trials": 2, **ENDLESS}), "--storage", database, "--address", head.address, "--json",
    )  # fmt: skip
    first = nas(*command)
    assert first.code == 0, first.err
    made = json.loads(first.out)
    assert made["fresh"] and made["storage"] == database and made["job"].startswith("nas-tiny-")
    again = nas(*command)
    assert json.loads(again.out) == made | {"fresh": False, "status": json.loads(again.out)["status"]}
    log = lambda: nas("logs", made["job"], "--address", head.address).out  # noqa: E731
    until(lambda: states(database) == ["running"], log)
    [row] = json.loads(nas("jobs", "--address", head.address, "--json").out)
    assert (row["job"], row["status"], row["study"]) == (made["job"], "running", "tiny")
    assert "1 workers (Ray, auto)" in log()
    stopped = nas("cancel", made["job"], "--address", head.address, "--json")
    assert json.loads(stopped.out) == {"job": made["job"], "status": "stopped", "asked_to_stop": True}
    until(lambda: states(database) == ["waiting"], log, 10)
    once_more = nas("cancel", made["job"], "--address", head.address)
    assert once_more.code == 0 and "had ended already: stopped" in once_more.err


def test_fault_43_token_absent_or_wrong_is_one_hint(
    head: Any, nas: Callable[..., Any], tmp_path: Path, config_file: Callable[..., str], database: str
) -> None:
    absent = nas("jobs", "--address", head.address, HOME=str(tmp_path))
    assert absent.code == 2 and absent.out == ""
    assert "asks for a token and none was found: set RAY_AUTH_TOKEN" in absent.err
    wrong = nas("jobs", "--address", head.address, RAY_AUTH_TOKEN="not-the-token-of-this-head")
    assert wrong.code == 2 and "refuses the token" in wrong.err
    submitted = nas(
        "submit", config_file(), "--storage", database, "--address", head.address, RAY_AUTH_TOKEN="x" * 36
    )
    assert submitted.code == 2 and "refuses the token" in submitted.err
    for said in (absent, wrong, submitted):
        assert len(said.err.splitlines()) <= 2 and "Traceback" not in said.err
        assert "not-the-token" not in said.err and "x" * 36 not in said.err


def test_a_job_that_nobody_knows(head: Any, nas: Callable[..., Any]) -> None:
    for command in (("logs",), ("logs", "-f"), ("cancel",)):
        said = nas(*command, "nas-tiny-nobody", "--address", head.address)
        assert said.code == 2 and said.out == ""
        assert said.err.startswith("nas: no job 'nas-tiny-nobody' at") and len(said.err.splitlines()) == 1


def test_a_flag_stands_above_rays_own_variables(head: Any, nas: Callable[..., Any]) -> None:
    said = nas(
        "jobs", "--address", head.address, "--json",
        RAY_AUTH_TOKEN=TOKEN, RAY_ADDRESS="http://127.0.0.1:9",
    )  # fmt: skip
    assert said.code == 0, said.err


LIGHT = """
import sys
from nas.cli.main import main
assert main(["jobs", "--address", sys.argv[1], "--json"]) == 0
print([name for name in ("torch", "optuna", "sqlalchemy.orm", "triton") if name in sys.modules])
"""


def test_asking_for_jobs_loads_no_torch(head: Any, start: Callable[..., Any]) -> None:
    process = start("-c", LIGHT, head.address, RAY_AUTH_TOKEN=TOKEN)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.splitlines()[-1] == "[]"


@pytest.mark.exhaustive
def test_results_outlive_the_head(
    head: Any, nas: Callable[..., Any], config_file: Callable[..., str], database: str, tmp_path: Path
) -> None:
    """Killed in the middle of a search and started again, a head knows no job; the database has every result."""
    long = {
        "trials": 4,
        "tasks": {
            "mqar": {"steps": 400, "batch": 8, "learning_rates": [0.01]},
            "bytes": {"steps": 2, "batch": 2},
        },
    }
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("a text of the person, which the cluster lacks. " * 200)
    data = ("--data", tmp_path / "texts")
    command = (
        "submit", config_file(long), "--storage-env", "WHERE", "--address", head.address, "--json", *data,
    )  # fmt: skip
    refused = json.loads(nas(*command).out)
    followed = nas("logs", "-f", refused["job"], "--address", head.address, "--json")
    *lines, last = map(json.loads, followed.out.splitlines())
    assert last == {"job": refused["job"], "status": "failed", "exit_code": 2}
    assert any("--storage-env WHERE: there is no such" in line["line"] for line in lines)

    command = (*command[:2], "--storage", database, *command[4:])
    made = json.loads(nas(*command).out)
    log = lambda: nas("logs", made["job"], "--address", head.address).out  # noqa: E731
    until(lambda: "done" in states(database), log)
    head.kill()
    before = states(database)
    assert head.left() == [] and before.count("done") < 4
    head.start()
    assert json.loads(nas("jobs", "--address", head.address, "--json").out) == []
    resumed = json.loads(nas(*command).out)
    assert resumed["job"] == made["job"] and resumed["fresh"]
    followed = nas("logs", "-f", made["job"], "--address", head.address)
    assert followed.code == 0 and f"job {made['job']}: succeeded" in followed.err, followed.out
    assert states(database) == ["done"] * 4
    with Store.open(database, read_only=True) as store:
        study = store.study("tiny")
        assert study is not None
        assert [len(trial.results) for trial in store.trials(study)] == [1] * 4
        assert study.config["data"] == "nas-job-data/texts"
    same = json.loads(nas(*command).out)
    assert (same["job"], same["fresh"], same["status"]) == (made["job"], False, "succeeded")


TELLING = """
import sys
from nas.workers import ray_pool
from nas.cli.main import main

def tell(job, text, far):
    import nas.workers.node
    from trainers.outcome import Unfit
    return Unfit(why=" ".join([nas.workers.node.__file__, text.sha256, str(far)]))

ray_pool.work = tell
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.exhaustive
def test_a_search_from_outside_brings_its_code_and_its_text(
    head: Any, start: Callable[..., Any], config_file: Callable[..., str], database: str, tmp_path: Path
) -> None:
    text = tmp_path / "one.txt"
    text.write_text("a text of the person, which the nodes lack. " * 200)
    config = config_file({"trials": 1, "tasks": {"bytes": {"steps": 2, "batch": 2}}})
    process = start(
        "-c", TELLING, "search", "--config", config, "--storage", database, "--data", str(text),
        "--ray-address", f"127.0.0.1:{head.port}",
        RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN,
    )  # fmt: skip
    _, err = process.communicate(timeout=120)
    assert process.returncode == 4, err
    with Store.open(database, read_only=True) as store:
        study = store.study("tiny")
        assert study is not None
        [trial] = store.trials(study)
        place, digest, far = trial.why.split()
        assert "py_modules_files" in place and far == "True"
        assert digest == study.config["data_sha256"]


@pytest.mark.exhaustive
def test_fault_05_the_head_dies_under_a_search_and_the_search_is_interrupted(
    head: Any, start: Callable[..., Any], config_file: Callable[..., str], database: str
) -> None:
    process = start(
        "-m", "nas", "search", "--config", config_file({"trials": 2, **ENDLESS}), "--storage", database,
        "--ray-address", f"127.0.0.1:{head.port}", "--json",
        RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN,
    )  # fmt: skip
    until(lambda: states(database) == ["running"], lambda: str(process.poll()))
    head.kill()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 5 and out == "", err
    assert "has not answered for 30 seconds; every result is kept" in err and "Traceback" not in err
    head.start()
