"""Damage of every kind is planted and found, each in a line that says where; a sound database is called sound."""

import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from storage.check import check
from storage.engine import Database
from storage.errors import StorageError
from storage.place import place_of
from storage.store import Store


def read_layout(layers: list[Any]) -> tuple[str, str]:
    """The builders' layouts all have these two layers, so their text is in the first of them."""
    if not layers:
        raise ValueError("there is no layer")
    return layers[0]["key"], layers[0]["text"]


def fill(url: str, build: Any) -> str:
    """Five trials of one study, in the states that last."""
    with Store.open(url) as store:
        study = build.study(store)
        for index in range(5):
            new = build.trial(index)
            named = {"key": new.layout.key, "text": new.layout.text}
            store.add_trial(
                study, replace(new, layout=replace(new.layout, layers=(named, {"mixer": "full"})))
            )
        for number in range(3):
            assert store.finish_trial(study, number, store.start_trial(study, number), build.result)
        assert store.add_repeat(study, 0, "evaluation", replace(build.result, seed=5))
        attempt = store.start_trial(study, 3)
        assert store.finish_trial(study, 3, attempt, build.result, state="pruned")
    return url


@pytest.fixture
def sound(shared_url: str, build) -> str:
    return fill(shared_url, build)


@pytest.fixture
def sound_file(tmp_path: Path, build) -> str:
    """What a server does not let happen is tried on a file alone."""
    return fill(f"sqlite:///{tmp_path}/nas.db", build)


def spoil(url: str, *statements: str) -> None:
    """Changes rows behind the store's back; nothing refers to anything meanwhile."""
    with closing(Database(place_of(url), read_only=False)) as database, database.altering() as connection:
        for statement in statements:
            connection.execute(text(statement))


def findings(url: str) -> list[tuple[str, str]]:
    return [(finding.check, finding.said) for finding in check(url, read_layout).findings]


def test_a_sound_database_has_no_findings(sound: str) -> None:
    found = check(sound, read_layout)
    assert (found.findings, found.whole) == ((), True)
    assert found.version == found.newest and found.storage and "canary" not in found.storage


DAMAGE = {
    "a gap in the numbers": (
        "UPDATE nas_trials SET number = 9 WHERE number = 4",
        "trials",
        "study 'first': 5 trials have 5 numbers from 0 to 9, instead of 0 to 4",
    ),
    "a done trial without a result": (
        "DELETE FROM nas_results WHERE trial_id = 2",
        "results",
        "study 'first', trial 1 is done and has no result",
    ),
    "a pruned trial without a result": (
        "DELETE FROM nas_results WHERE trial_id = 4",
        "results",
        "study 'first', trial 3 is pruned and has no result",
    ),
    "a result of a trial that never ran": (
        "UPDATE nas_trials SET attempts = 0 WHERE number = 2",
        "results",
        "study 'first', trial 2 was never started and has a result",
    ),
    "a further seed of a trial that is not done": (
        "UPDATE nas_repeats SET trial_id = 4",
        "results",
        "study 'first', trial 3 is pruned and was trained with further seeds, as only a done one is",
    ),
    "an infinite quality": (
        "UPDATE nas_results SET quality = {infinity} WHERE trial_id = 1",
        "numbers",
        "study 'first', trial 0, rung 0: quality is inf: only finite numbers are stored",
    ),
    "an infinite time of a further seed": (
        "UPDATE nas_repeats SET train_s = {infinity}",
        "numbers",
        "study 'first', trial 0, seed 5: train_s is inf: only finite numbers are stored",
    ),
    "an infinite latency": (
        "INSERT INTO nas_latencies VALUES ('cpu', 'small', 'kda', 'decode', {false}, {infinity}, 0.5, 9)",
        "numbers",
        "latency of kda in decode: latency_ms is inf: only finite numbers are stored",
    ),
    "a cost that is no number": (
        """UPDATE nas_trials SET costs = '{{"kv_bytes": "many"}}' WHERE number = 1""",
        "numbers",
        "study 'first', trial 1: costs['kv_bytes'] is 'many': only finite numbers are stored",
    ),
    "a layer's cost that is no number": (
        """UPDATE nas_trials SET layer_costs = '[{{"a": 1}}, {{"a": null}}]' WHERE number = 1""",
        "numbers",
        "study 'first', trial 1: layer_costs[1]['a'] is None: only finite numbers are stored",
    ),
    "scores that are no mapping": (
        "UPDATE nas_results SET scores = '3' WHERE trial_id = 1",
        "numbers",
        "study 'first', trial 0, rung 0: scores is no mapping of names to numbers",
    ),
    "a point that is missing": (
        "DELETE FROM nas_points WHERE number = 1",
        "points",
        "study 'first', trial 1: its point is none and must be (1, 0.75, 4096)",
    ),
    "a point of a trial that is not done": (
        "INSERT INTO nas_points SELECT study_id, 3, packed FROM nas_points WHERE number = 1",
        "points",
        "study 'first', trial 3: its point is (1, 0.75, 4096) and must be none",
    ),
    "a point of another trial": (
        "UPDATE nas_points SET packed = (SELECT packed FROM nas_points WHERE number = 2) WHERE number = 1",
        "points",
        "study 'first', trial 1: its point is (2, 0.75, 4096) and must be (1, 0.75, 4096)",
    ),
    "a layout with another's layers": (
        """UPDATE nas_layouts SET layers = '[{{"key": "key3", "text": "4*kda full"}}]' WHERE key = 'key1'""",
        "layouts",
        "layout 'key1' is '2*kda full', but its layers are '4*kda full', whose key is 'key3'",
    ),
    "a layout without layers": (
        "UPDATE nas_layouts SET layers = '[]' WHERE key = 'key1'",
        "layouts",
        "layout 'key1' (2*kda full) cannot be read: there is no layer",
    ),
    "a table that is missing": ("DROP TABLE nas_repeats", "tables", "table nas_repeats is missing"),
    "an index that is missing": (
        "DROP INDEX nas_trials_by_layout",
        "tables",
        "index nas_trials_by_layout of table nas_trials is missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_named(sound: str, damage: str) -> None:
    statement, kind, said = DAMAGE[damage]
    server = sound.startswith("postgresql")
    words = {"infinity": "'Infinity'", "false": "false"} if server else {"infinity": "9e999", "false": "0"}
    spoil(sound, statement.format(**words))
    assert findings(sound) == [(kind, said)]
    assert check(sound, read_layout).whole is (kind != "tables")


def test_what_only_a_file_lets_happen_is_found_too(sound_file: str) -> None:
    spoil(
        sound_file,
        "UPDATE nas_trials SET costs = '{\"kv_bytes\": NaN}' WHERE number = 0",
        "UPDATE nas_trials SET layer_costs = 'torn[' WHERE number = 1",
        "UPDATE nas_results SET quality = 'good' WHERE trial_id = 3",
        "UPDATE nas_layouts SET layers = 'torn[' WHERE key = 'key1'",
    )
    found = findings(sound_file)
    assert [kind for kind, _said in found] == ["numbers", "numbers", "numbers", "layouts"]
    assert "trial 0: costs['kv_bytes'] is nan" in found[0][1]
    assert "trial 1: layer_costs is no JSON (Expecting value" in found[1][1]
    assert "trial 2, rung 0: quality is 'good'" in found[2][1]
    assert "layout 'key1' (2*kda full) cannot be read" in found[3][1]


def test_references_to_nothing_are_found(sound_file: str) -> None:
    spoil(sound_file, "DELETE FROM nas_layouts WHERE key = 'key2'")
    said = "nas_trials: 1 rows refer to rows of nas_layouts that are not there, such as row 3"
    assert findings(sound_file) == [("references", said)]


def test_a_state_that_is_none_is_found(sound_file: str) -> None:
    spoil(
        sound_file,
        "PRAGMA ignore_check_constraints = ON",
        "UPDATE nas_trials SET state = 'odd' WHERE number = 4",
    )
    [(kind, said)] = findings(sound_file)
    # Newer releases of SQLite check such rules themselves.
    assert kind in ("file", "trials") and ("the state 'odd'" in said or "CHECK" in said)


def test_a_torn_page_is_found_and_nothing_else_is_asked(sound_file: str) -> None:
    path = Path(sound_file.removeprefix("sqlite:///"))
    with (
        closing(Database(place_of(sound_file), read_only=True)) as database,
        database.reading() as connection,
    ):
        wanted = "SELECT rootpage FROM sqlite_schema WHERE name = 'nas_trials_by_state'"
        page = connection.execute(text(wanted)).scalar_one()
        size = connection.exec_driver_sql("PRAGMA page_size").scalar_one()
    torn = bytearray(path.read_bytes())
    torn[(page - 1) * size + 8 : page * size] = bytes(size - 8)
    path.write_bytes(torn)
    found = check(sound_file, read_layout)
    assert found.findings and {finding.check for finding in found.findings} == {"file"}
    assert found.whole is False


def test_a_running_trial_is_found_unless_somebody_runs_it(sound: str) -> None:
    with Store.open(sound) as store:
        study = store.study("first")
        assert study is not None
        with store.writer(study):
            store.start_trial(study, 4)
            assert findings(sound) == []
    said = (
        "study 'first': trial 4 is running, but no process writes the study:"
        " nas search with the same study runs what was cut off again"
    )
    assert findings(sound) == [("writers", said)]


def test_a_writer_that_was_killed_holds_nothing(sound: str, child) -> None:
    code = """
import sys
from storage.store import Store
store = Store.open(sys.argv[1])
study = store.study("first")
with store.writer(study):
    store.start_trial(study, 4)
    store.start_trial(study, 3)
    print("running", flush=True)
    input()
"""
    writer = child(code, sound)
    assert writer.line() == "running"
    assert findings(sound) == []
    writer.process.kill()
    writer.process.wait()
    with Store.open(sound) as store:
        study = store.study("first")
        assert study is not None
        [(kind, said)] = _until_freed(sound)
        assert kind == "writers" and "trials 3, 4 are running, but no process writes the study" in said
        with store.writer(study):
            store.requeue_abandoned(study)
    assert findings(sound) == []


def _until_freed(url: str) -> list[tuple[str, str]]:
    """A server notices in its own time that the other end of a connection is gone."""
    for _ in range(100):
        found = findings(url)
        if found:
            return found
        time.sleep(0.05)
    return []


def test_there_must_be_a_database(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no database at"):
        check(f"sqlite:///{tmp_path}/none.db", read_layout)
    assert list(tmp_path.iterdir()) == []
