"""Several processes on one database: one writer, many readers, and a death at any moment."""

import os
import signal
import sqlite3
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, update

from storage import engine
from storage.engine import Database
from storage.errors import ConnectionLost, StorageError
from storage.locks import keep_writers_out, writer_of
from storage.place import place_of
from storage.records import StudyRecord
from storage.store import Store
from storage.tables import SCHEMA_VERSION, SchemaRow

HOLD_WRITER = """
import os, sys
from storage.store import Store
with Store.open(sys.argv[1]) as store:
    study = store.study("first")
    with store.writer(study):
        print("holding", os.getpid(), flush=True)
        input()
    print("released", flush=True)
    input()
"""

START_A_TRIAL = """
import sys
from storage.store import Store
store = Store.open(sys.argv[1])
study = store.study("first")
with store.writer(study):
    print("started", store.start_trial(study, 0), flush=True)
    input()
"""

COMMIT_MANY = """
import sys
from storage.records import LayoutRecord, NewTrial, ResultRecord
from storage.store import Store
with Store.open(sys.argv[1]) as store:
    study = store.study("first")
    print("ready", flush=True)
    input()
    for index in range(40):
        layout = LayoutRecord(key=str(index), text=str(index), layers=())
        new = NewTrial(layout=layout, origin="", params={}, sampler_attrs={}, costs={}, layer_costs=(),
                       evaluation_key=str(index))
        number = store.add_trial(study, new).number
        result = ResultRecord(rung=0, quality=0.5, scores={}, details={}, steps=1, tokens=1, train_s=1.0,
                              worker_s=1.0, seed=0)
        assert store.finish_trial(study, number, store.start_trial(study, number), result)
    print("finished", flush=True)
"""

ADD_TRIALS = """
import sys
from storage.records import LayoutRecord, NewTrial
from storage.store import Store
with Store.open(sys.argv[1]) as store:
    study = store.study("first")
    print("ready", flush=True)
    input()
    for index in range(25):
        key = f"{sys.argv[2]}-{index}"
        new = NewTrial(layout=LayoutRecord(key=key, text=key, layers=()), origin=sys.argv[2], params={},
                       sampler_attrs={}, costs={}, layer_costs=(), evaluation_key=key)
        store.add_trial(study, new)
    print("finished", flush=True)
"""

FINISH_ALL = """
import sys
from storage.records import ResultRecord
from storage.store import Store
with Store.open(sys.argv[1]) as store:
    study = store.study("first")
    with store.writer(study):
        store.requeue_abandoned(study)
        print("resumed", flush=True)
        for trial in store.trials(study, states=["waiting"]):
            attempt = store.start_trial(study, trial.number)
            result = ResultRecord(rung=0, quality=trial.number / 100, scores={}, details={}, steps=attempt, tokens=1,
                                  train_s=1.0, worker_s=1.0, seed=0)
            assert store.finish_trial(study, trial.number, attempt, result)
            store.update_costs(study, trial.number, {"latency_ms": 1.0})
    print("finished", flush=True)
"""

TEAR = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 2")  # so that pages reach the file before the commit
connection.execute("BEGIN IMMEDIATE")
for index in range(2000):
    connection.execute("INSERT INTO nas_events (at, kind, payload) VALUES (0, 'half', ?)", ('"' + "x" * 500 + '"',))
print("torn", flush=True)
time.sleep(60)
"""


def make(url: str, build, trials: int = 0) -> StudyRecord:
    with Store.open(url) as store:
        study = build.study(store)
        for index in range(trials):
            store.add_trial(study, build.trial(index))
    return study


def test_fault_15_a_second_writer_of_a_file_is_refused_until_the_first_is_gone(
    tmp_path: Path, build, child
) -> None:
    url = f"sqlite:///{tmp_path}/nas.db"
    study = make(url, build)
    other = child(HOLD_WRITER, url)
    word, pid = other.line().split()
    assert word == "holding"
    with Store.open(url) as store:
        second = build.study(store, "second")
        with pytest.raises(
            StorageError, match=rf"study 'first' is being written by another process \(pid {pid} on "
        ):
            store.writer(study).__enter__()
        with store.writer(second):  # another study is free
            pass
        other.go_on()
        assert other.line() == "released"
        with store.writer(study):
            store.log(study, "mine", {})
    assert [left.name for left in tmp_path.iterdir()] == ["nas.db"]


def test_two_stores_of_one_process_do_not_share_the_place_in_a_file(tmp_path: Path, build) -> None:
    url = f"sqlite:///{tmp_path}/nas.db"
    study = make(url, build)
    with Store.open(url) as first, Store.open(url) as second, first.writer(study):
        for store in (first, second):
            with pytest.raises(StorageError, match="is being written"), store.writer(study):
                pass


def test_the_writers_place_is_left_on_an_error(shared_url: str, build) -> None:
    study = make(shared_url, build)
    with Store.open(shared_url) as store:
        with pytest.raises(RuntimeError, match="a bug"), store.writer(study):
            raise RuntimeError("a bug")
        with store.writer(study):
            pass


def test_a_killed_writer_frees_its_place_and_its_trial(shared_url: str, build, child) -> None:
    study = make(shared_url, build, trials=1)
    other = child(START_A_TRIAL, shared_url)
    assert other.line() == "started 1"
    os.kill(other.process.pid, signal.SIGKILL)
    other.process.wait()
    with Store.open(shared_url) as store:
        for _ in range(100):  # a server notices in its own time
            try:
                with store.writer(study):
                    assert store.requeue_abandoned(study) == [0]
                break
            except StorageError:
                time.sleep(0.05)
        assert not store.finish_trial(study, 0, 1, build.result)
        assert store.start_trial(study, 0) == 2
        assert not store.finish_trial(study, 0, 1, build.result)
        assert store.finish_trial(study, 0, 2, build.result)
        assert not store.finish_trial(study, 0, 2, build.result)
        (trial,) = store.trials(study)
        assert (trial.state, trial.attempts, len(trial.results)) == ("done", 2, 1)


def test_a_writer_killed_again_and_again_loses_and_doubles_nothing(shared_url: str, build, child) -> None:
    study = make(shared_url, build, trials=60)
    delays_s = iter([0.0, 0.01, 0.02, 0.03, 0.04, 0.05])
    answer = ""
    while answer != "finished":
        other = child(FINISH_ALL, shared_url)
        if other.line() != "resumed":
            continue  # the server has not noticed yet that the last one is dead
        delay_s = next(delays_s, None)
        if delay_s is not None:
            time.sleep(delay_s)
            os.kill(other.process.pid, signal.SIGKILL)
        answer = other.line()
    with Store.open(shared_url, read_only=True) as reader:
        trials = reader.trials(study)
        assert [(trial.number, trial.state) for trial in trials] == [(number, "done") for number in range(60)]
        assert [[result.quality for result in trial.results] for trial in trials] == [
            [n / 100] for n in range(60)
        ]
        assert all(trial.result and trial.result.steps == trial.attempts for trial in trials)
        ended = [
            happened.payload["trial"]
            for happened in reader.events(study=study)
            if happened.kind == "trial_done"
        ]
        assert sorted(ended) == list(range(60))


def test_readers_see_whole_trials_while_a_writer_commits(shared_url: str, build, child) -> None:
    study = make(shared_url, build)
    writer = child(COMMIT_MANY, shared_url)
    assert writer.line() == "ready"
    with Store.open(shared_url, read_only=True) as reader:
        writer.go_on()
        seen: list[int] = []
        last = 0
        while last < 120:  # three events a trial
            trials = reader.trials(study)
            assert [trial.number for trial in trials] == list(range(len(trials)))
            assert all((trial.state == "done") == (trial.result is not None) for trial in trials)
            fresh = [happened.seq for happened in reader.events(after=last)]
            assert fresh == list(range(last + 1, last + 1 + len(fresh)))
            last = fresh[-1] if fresh else last
            seen.append(len(trials))
        assert seen == sorted(seen)
        assert reader.counts(study)["done"] == 40
    assert writer.line() == "finished"


def test_two_processes_never_count_to_the_same_number(shared_url: str, build, child) -> None:
    study = make(shared_url, build)
    others = [child(ADD_TRIALS, shared_url, name) for name in ("a", "b")]
    assert [other.line() for other in others] == ["ready", "ready"]
    for other in others:
        other.go_on()
    assert [other.line() for other in others] == ["finished", "finished"]
    with Store.open(shared_url) as store:
        assert [trial.number for trial in store.trials(study)] == list(range(50))
        assert len(store.events(study=study)) == 50


def test_two_processes_may_make_the_tables_at_once(shared_url: str, child) -> None:
    code = (
        "import sys; from storage.store import Store; input(); Store.open(sys.argv[1]).close(); print('made')"
    )
    others = [child(code, shared_url) for _ in range(3)]
    for other in others:
        other.go_on()
    assert [other.line() for other in others] == ["made"] * 3


@pytest.mark.parametrize("opened_anew", [False, True])
def test_a_commit_torn_by_a_kill_is_rolled_back_even_for_a_reader(
    tmp_path: Path, build, child, opened_anew: bool
) -> None:
    path = tmp_path / "nas.db"
    study = make(f"sqlite:///{path}", build, trials=1)
    with Store.open(f"sqlite:///{path}", read_only=True) as reader:
        before = (reader.trials(study), reader.events())
        other = child(TEAR, str(path))
        assert other.line() == "torn"
        os.kill(other.process.pid, signal.SIGKILL)
        other.process.wait()
        assert Path(f"{path}-journal").stat().st_size > 0
        if opened_anew:
            with Store.open(f"sqlite:///{path}", read_only=True) as other_reader:
                assert (other_reader.trials(study), other_reader.events()) == before
        assert (reader.trials(study), reader.events()) == before
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_threads_share_a_store(url: str, build) -> None:
    with Store.open(url) as store:
        study = build.study(store)
        failures: list[BaseException] = []

        def work(origin: int) -> None:
            try:
                for index in range(5):
                    number = store.add_trial(study, build.trial(10 * origin + index)).number
                    store.trials(study)
                    attempt = store.start_trial(study, number)
                    assert store.finish_trial(study, number, attempt, build.result)
            except BaseException as error:  # noqa: BLE001 - reported by the thread that asked
                failures.append(error)

        threads = [threading.Thread(target=work, args=(origin,)) for origin in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert [trial.number for trial in store.trials(study, states=["done"])] == list(range(20))


def test_fault_23_a_crash_of_the_server_between_two_steps_is_survived(server, build) -> None:
    with Store.open(server.new_database()) as store:
        study = build.study(store)
        with store.writer(study):
            for index in range(3):
                number = store.add_trial(study, build.trial(index)).number
                attempt = store.start_trial(study, number)
                server.stop(signal.SIGQUIT)
                server.start()
                assert store.finish_trial(study, number, attempt, build.result)
                with (
                    closing(Database(place_of(store.url), read_only=True)) as database,
                    database.reading() as connection,
                ):
                    holder = writer_of(database, connection, study)
                assert holder is not None and holder.startswith(
                    f"pid {os.getpid()} on "
                )  # it was taken again
        assert [trial.state for trial in store.trials(study)] == ["done"] * 3
        assert len([happened for happened in store.events(study=study) if happened.kind == "trial_done"]) == 3


def test_a_writer_whose_database_was_upgraded_while_the_server_was_away_stops_writing(server, build) -> None:
    url = server.new_database()
    with Store.open(url) as first:
        study = build.study(first)
        with first.writer(study):
            first.add_trial(study, build.trial())
            server.stop(signal.SIGQUIT)
            server.start()
            with closing(Database(place_of(url), read_only=False)) as database:
                with database.writing() as upgrading, ExitStack() as held:
                    keep_writers_out(database, upgrading, [study], held)
                    with pytest.raises(StorageError, match="is being upgraded: wait until"):
                        first.start_trial(study, 0)
                    upgrading.execute(update(SchemaRow).values(version=SCHEMA_VERSION + 1))
                for _ in range(2):
                    with pytest.raises(StorageError, match=f"has schema {SCHEMA_VERSION + 1}, newer than"):
                        first.start_trial(study, 0)
                with database.writing() as back:
                    back.execute(update(SchemaRow).values(version=SCHEMA_VERSION))
            assert first.start_trial(study, 0) == 1


def test_a_server_that_stays_away_is_an_error(server, build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "RECONNECT_S", 0.3)
    with Store.open(server.new_database()) as store:
        study = build.study(store)
        server.stop()
        try:
            with pytest.raises(StorageError, match=r"check that the server runs|the connection was lost"):
                store.log(study, "tick", {})
        finally:
            server.start()
        store.log(study, "tick", {})
        assert len(store.events()) == 1


@pytest.mark.parametrize("arrived", [True, False])
def test_fault_24_a_connection_lost_in_the_commit_is_asked_about(server, build, arrived: bool) -> None:
    with Store.open(server.new_database()) as store:
        study = build.study(store)
        store.add_trial(study, build.trial())
        attempt = store.start_trial(study, 0)
        cuts: list[Any] = []

        def cut(connection: Any) -> None:
            if cuts or not connection.get_transaction():
                return
            raw = connection.connection.dbapi_connection
            cuts.append(raw)
            if arrived:
                raw.commit()
            with Store.open(store.url) as other, other._database.writing() as killer:
                killer.exec_driver_sql(f"SELECT pg_terminate_backend({raw.info.backend_pid})")
            for _ in range(100):  # until the server has closed it
                try:
                    raw.execute("SELECT 1")
                except Exception:  # noqa: BLE001 - whatever way it breaks
                    break
                time.sleep(0.02)

        event.listen(store._database._engine, "commit", cut)
        assert store.finish_trial(study, 0, attempt, build.result, costs={"latency_ms": 1.0})
        assert len(cuts) == 1
        event.remove(store._database._engine, "commit", cut)
        (trial,) = store.trials(study)
        assert (trial.state, trial.results) == ("done", (build.result,))
        happened = [one.kind for one in store.events(study=study)]
        assert happened == ["trial_waiting", "trial_running", "trial_done"]


def test_a_lost_connection_is_told_apart(server) -> None:
    with (
        Store.open(server.new_database()) as store,
        pytest.raises(ConnectionLost, match="the connection was lost"),
        store._database.writing() as connection,
    ):
        connection.exec_driver_sql("SELECT pg_terminate_backend(pg_backend_pid())")
