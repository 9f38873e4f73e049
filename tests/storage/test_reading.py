"""Reading many trials: by state, by page, in two queries, and the counts of a study."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, event, insert

from storage import portions
from storage.records import STATES, StudyRecord
from storage.store import Store
from storage.tables import LayoutRow, ResultRow, TrialRow


@pytest.fixture
def study(store: Store, build) -> StudyRecord:
    return build.study(store)


def test_trials_are_read_by_state_and_by_page(store: Store, study: StudyRecord, build) -> None:
    for index in range(6):
        store.add_trial(study, build.trial(index))
    for number in (4, 2):
        store.start_trial(study, number)
        store.finish_trial(study, number, 1, build.result_of(number / 10))
    assert [trial.number for trial in store.trials(study, states={"done"})] == [2, 4]
    assert [trial.number for trial in store.trials(study, states=["done", "waiting"], offset=1, limit=3)] == [
        1,
        2,
        3,
    ]
    page = store.trials(study, offset=4)
    assert [(trial.number, trial.result and trial.result.quality) for trial in page] == [(4, 0.4), (5, None)]
    assert (
        store.trials(study, limit=0) == store.trials(study, states=[]) == store.trials(study, offset=9) == []
    )
    with pytest.raises(ValueError, match="neither may be negative"):
        store.trials(study, offset=-1)


def test_fault_36_reader_of_a_file_lets_its_writer_in_between(
    tmp_path: Path, build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that took all trials at once would hold up the search's next commit until it has them all."""
    url = f"sqlite:///{tmp_path}/nas.db"
    monkeypatch.setattr(portions, "PORTION", 2)
    with Store.open(url) as writer, Store.open(url, read_only=True) as reader:
        study = build.study(writer)
        for index in range(7):
            writer.add_trial(study, build.trial(index))
        real, moments = reader._database.reading, []

        @contextmanager
        def reading(**given: Any) -> Iterator[Connection]:
            # Between two portions: a commit that had to wait for the reader would never come to its end here.
            writer.log(study, "between", {"moment": len(moments)})
            with real(**given) as connection:
                moments.append(connection)
                yield connection

        monkeypatch.setattr(reader._database, "reading", reading)
        assert reader.trials(study) == writer.trials(study)
        assert len(moments) == 1 + 4  # how many there are, then two at a time
        for number in (1, 4):
            writer.start_trial(study, number)
        assert [trial.number for trial in reader.trials(study, states={"running"})] == [1, 4]
        assert [trial.number for trial in reader.trials(study, states={"waiting"})] == [0, 2, 3, 5, 6]
        assert reader.trials(study, states=[]) == []
    assert len(moments) == 4 * 5


WRITER = """
import sys
from storage import engine
from storage.store import Store
engine.BUSY_TIMEOUT_S = 6.0
with Store.open(sys.argv[1]) as store:
    for number in range(4):
        store.log(store.studies()[0], "written", {"number": number})
print("written", flush=True)
"""


def test_fault_36_readers_that_always_overlap_do_not_keep_a_writer_out(tmp_path: Path, build, child) -> None:
    """Two pages that are asked for without a pause, each for longer than a writer would wait between its tries."""
    url = f"sqlite:///{tmp_path}/nas.db"
    with Store.open(url) as writer:
        build.study(writer)
    over = threading.Event()

    def read() -> None:
        with Store.open(url, read_only=True) as reader:
            while not over.is_set():
                with reader._database.reading() as connection:
                    connection.exec_driver_sql("SELECT count(*) FROM nas_studies").all()
                    time.sleep(0.25)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
        time.sleep(0.08)
    try:
        assert child(WRITER, url).line() == "written"
    finally:
        over.set()
        for reader in readers:
            reader.join()


def test_counts_name_every_state(store: Store, study: StudyRecord, build) -> None:
    assert store.counts(study) == dict.fromkeys(STATES, 0)
    for index in range(3):
        store.add_trial(study, build.trial(index))
    store.start_trial(study, 1)
    assert store.counts(study) == dict.fromkeys(STATES, 0) | {"waiting": 2, "running": 1}


def test_ten_thousand_trials_are_read_in_a_few_queries(store: Store, study: StudyRecord, build) -> None:
    new, result = build.trial(), build.result
    layouts = [{"key": f"key{number}", "text": f"{number}*kda", "layers": []} for number in range(10_000)]
    trials = [
        {
            "id": number + 1,
            "study_id": study.id,
            "number": number,
            "state": "done",
            "origin": "random",
            "layout_key": f"key{number}",
            "params": {},
            "sampler_attrs": {},
            "costs": dict(new.costs),
            "layer_costs": [],
            "evaluation_key": f"evaluation{number}",
            "attempts": 1,
            "why": "",
            "created_at": 1.0,
        }
        for number in range(10_000)
    ]
    measured = {
        "rung": 0,
        "scores": dict(result.scores),
        "details": {},
        "steps": 1,
        "tokens": 1,
        "train_s": 1.0,
        "worker_s": 1.0,
        "seed": 0,
    }
    results = [{**measured, "trial_id": number + 1, "quality": number / 10_000} for number in range(10_000)]
    with store._database.writing() as connection:
        connection.execute(insert(LayoutRow), layouts)
        connection.execute(insert(TrialRow), trials)
        connection.execute(insert(ResultRow), results)
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        statements.append(statement)

    engine = store._database._engine
    event.listen(engine, "before_cursor_execute", note)
    read = store.trials(study)
    selects = [statement for statement in statements if statement.lstrip().startswith("SELECT")]
    statements.clear()
    page = store.trials(study, states={"done"}, offset=5000, limit=50)
    paged = [statement for statement in statements if statement.lstrip().startswith("SELECT")]
    event.remove(engine, "before_cursor_execute", note)
    assert len(selects) == len(paged) == 3
    assert [trial.number for trial in read] == list(range(10_000))
    assert page == read[5000:5050]
    assert read[1234].result == replace(
        result, quality=0.1234, details={}, steps=1, tokens=1, train_s=1.0, worker_s=1.0
    )
