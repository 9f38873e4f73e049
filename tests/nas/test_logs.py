"""A study's log: lines of JSON that say what happened, where it lies, how it rotates, and that it never stands in the way."""

import json
import logging
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from nas import logs
from nas.logs import StudyLog, log_path
from nas.redaction import Redactor
from nas.search import Search
from nas.stopping import Stopped

Run = Callable[..., Any]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def make(tmp_path: Path, said: list[str]) -> Callable[..., StudyLog]:
    def build(path: Path | None = None, level: logs.Level = "info") -> StudyLog:
        redactor = Redactor.of({}, ["postgresql://me:canary7f3e@db/nas"])
        return StudyLog(path or tmp_path / "a.jsonl", level, study="s", redactor=redactor, warn=said.append)

    return build


def test_a_line_says_when_how_grave_which_study_and_what(make: Callable[..., StudyLog]) -> None:
    log = make()
    log.write("warning", "trial_ended", {"trial": 3, "layout": "2*kda", "τ": float("nan"), "of": Path("x")})
    log.write("debug", "unheard", {})
    log.close()
    [line] = lines(log.path)
    moment = datetime.fromisoformat(line.pop("time"))
    assert moment.tzinfo == UTC and abs((datetime.now(UTC) - moment).total_seconds()) < 60
    assert line == {
        "level": "warning", "study": "s", "event": "trial_ended", "trial": 3, "layout": "2*kda", "τ": None, "of": "x",
    }  # fmt: skip


@pytest.mark.parametrize(("level", "heard"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_the_level_is_the_least_that_is_heard(
    make: Callable[..., StudyLog], level: logs.Level, heard: int
) -> None:
    log = make(level=level)
    for one in logs.LEVELS:
        log.write(one, one, {})
    log.close()
    assert [line["level"] for line in lines(log.path)] == list(logs.LEVELS[-heard:])


def test_fields_and_tracebacks_hold_no_secret(make: Callable[..., StudyLog]) -> None:
    log = make()
    try:
        raise ValueError("no postgresql://me:canary7f3e@db/nas, nor canary7f3e alone")
    except ValueError as error:
        log.write("error", "search_failed", {"message": str(error), "password": "canary7f3e"}, error)
    log.close()
    [line] = lines(log.path)
    assert "canary7f3e" not in log.path.read_text()
    assert line["message"] == "no postgresql://me:***@db/nas, nor *** alone"
    assert line["traceback"].startswith("Traceback") and "ValueError: no postgresql" in line["traceback"]


def test_half_a_surrogate_pair_is_no_obstacle(make: Callable[..., StudyLog], said: list[str]) -> None:
    log = make()
    log.write("info", "odd", {"name": "a\udc80b\u2028"})
    log.close()
    assert [line["name"] for line in lines(log.path)] == ["a\udc80b\u2028"] or said == []
    assert len(log.path.read_bytes().splitlines()) == 1


def test_it_rotates_by_size(make: Callable[..., StudyLog], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MOST_BYTES", 4000)
    log = make()
    for number in range(400):
        log.write("info", "tick", {"number": number})
    log.close()
    files = sorted(log.path.parent.glob("a.jsonl*"))
    assert [path.name for path in files] == ["a.jsonl", "a.jsonl.1", "a.jsonl.2", "a.jsonl.3"]
    assert all(path.stat().st_size <= 4000 for path in files)
    kept = [line["number"] for path in [*files[:0:-1], files[0]] for line in lines(path)]
    assert kept == list(range(kept[0], 400))


def test_two_searches_of_one_study_rotate_one_file_and_lose_no_line(
    make: Callable[..., StudyLog], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MOST_BYTES", 1500)
    monkeypatch.setattr(logs, "OLDER_FILES", 10_000)
    both = [make(), make()]

    def write(whose: int) -> None:
        for number in range(200):
            both[whose].write("info", "line", {"whose": whose, "number": number})

    threads = [threading.Thread(target=write, args=(whose,)) for whose in (0, 1)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for log in both:
        log.close()
    files = list(both[0].path.parent.glob("a.jsonl*"))
    written = sorted((line["whose"], line["number"]) for file in files for line in lines(file))
    assert written == [(whose, number) for whose in (0, 1) for number in range(200)]
    assert said == [] and len(files) > 10


def test_a_torn_line_stays_alone(make: Callable[..., StudyLog], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"time": "2026')
    log = make()
    log.write("info", "after", {})
    log.close()
    torn, whole = log.path.read_text().splitlines()
    assert torn == '{"time": "2026' and json.loads(whole)["event"] == "after"


@pytest.mark.parametrize("name", ["/dev/full", ".", "a-file/log.jsonl"])
def test_what_cannot_be_written_is_said_once_and_raises_nothing(
    make: Callable[..., StudyLog], said: list[str], tmp_path: Path, name: str
) -> None:
    (tmp_path / "a-file").write_text("")
    log = make(tmp_path / name)
    for number in range(5):
        log.write("info", "tick", {"number": number})
    log.close()
    [line] = said
    assert "cannot be written" in line and "the search goes on without it" in line


def test_once_there_is_room_again_it_goes_on(
    make: Callable[..., StudyLog], said: list[str], tmp_path: Path
) -> None:
    place = tmp_path / "logs"
    place.write_text("in the way")
    log = make(place / "log.jsonl")
    log.write("info", "lost", {})
    place.unlink()
    log.write("info", "kept", {})
    log.close()
    assert [line["event"] for line in lines(log.path)] == ["kept"] and len(said) == 1


def test_a_signal_while_a_line_is_written_is_not_swallowed(
    make: Callable[..., StudyLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = make()

    def interrupted(*_: object) -> str:
        raise Stopped

    monkeypatch.setattr(logs.JsonLines, "format", interrupted)
    with pytest.raises(Stopped):
        log.write("info", "tick", {})
    log.close()


def test_no_other_logger_is_touched(make: Callable[..., StudyLog]) -> None:
    before = list(logging.getLogger().handlers), set(logging.Logger.manager.loggerDict)
    log = make()
    log.write("info", "tick", {})
    log.close()
    assert (list(logging.getLogger().handlers), set(logging.Logger.manager.loggerDict)) == before


def test_every_study_has_a_file_of_its_own(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/nas.db"
    assert log_path(None, url, "quick") == tmp_path / "nas.db.quick.log.jsonl"
    assert log_path("~/x.jsonl", url, "quick") == Path("~/x.jsonl").expanduser()
    names = ["quick", "a/b", "a b", "a-b", "../../etc", "é", "é" * 200, "x" * 200, "x" * 199, "A\0"]
    places = {log_path(None, url, name) for name in names}
    assert len(places) == len(names) and {place.parent for place in places} == {tmp_path}
    assert all(len(place.name) < 120 for place in places)
    server = log_path(None, "postgresql://me:canary7f3e@db/nas", "quick")
    assert server.parent == Path(logs.CACHE).expanduser() and "canary" not in str(server)
    assert server != log_path(None, "postgresql://me:canary7f3e@other/nas", "quick")
    assert server == log_path(None, "postgresql://me:changed@db/nas", "quick")


@pytest.fixture
def search(run: Run, config_file: Callable[..., str], url: str) -> Run:
    def call(*arguments: object, changes: dict[str, Any] | None = None) -> Any:
        return run("search", "--config", config_file(changes), "--storage", url, *arguments)

    return call


def test_a_search_is_written_down(search: Run, tmp_path: Path) -> None:
    said = search("--trials", 3, changes={"repeats": 1})
    path = tmp_path / "nas.db.tiny.log.jsonl"
    assert said.code == 0 and f"log      {path}" in said.err
    log = lines(path)
    assert {line["study"] for line in log} == {"tiny"}
    assert [log[0]["event"], log[-1]["event"]] == ["search_started", "search_ended"]
    started = [line for line in log if line["event"] == "trial_started"]
    ended = [line for line in log if line["event"] == "trial_ended"]
    assert [line["trial"] for line in started] == [line["trial"] for line in ended] == [0, 1, 2]
    assert all(line["attempt"] == 1 and line["seconds"] > 0 and line["layout"] for line in ended)
    assert {line["state"] for line in ended} == {"done"} and [line["event"] for line in log].count(
        "seed_ended"
    ) == 1
    # A search that goes on appends, with another level and in another place as it likes.
    assert search("--trials", 4, "--log-level", "warning").code == 0
    assert lines(path) == log
    assert search("--trials", 5, "--log-file", tmp_path / "b.jsonl", "--log-level", "debug").code == 0
    assert [line["trial"] for line in lines(tmp_path / "b.jsonl") if line["event"] == "trial_ended"] == [4]


def test_skipped_proposals_are_heard_at_debug(search: Run, tmp_path: Path) -> None:
    search("--trials", 6, "--log-level", "debug", "--constraint", "kv_bytes<=40KiB")
    events = {line["event"] for line in lines(tmp_path / "nas.db.tiny.log.jsonl")}
    assert {"search_started", "trial_ended", "search_ended"} <= events


def test_an_unfit_trial_says_why(search: Run, tmp_path: Path) -> None:
    search("--trials", 1, changes={"tasks": {"mqar": {"steps": 9, "batch": 4, "learning_rates": [1e30]}}})
    ended = [line for line in lines(tmp_path / "nas.db.tiny.log.jsonl") if line["event"] == "trial_ended"]
    assert [(line["level"], line["state"]) for line in ended] == [("warning", "unfit")]
    assert "step" in ended[0]["why"]


def test_a_search_that_fails_leaves_its_traceback(
    search: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("near postgresql://me:canary7f3e@db/nas")

    monkeypatch.setattr(Search, "_open_new", broken)
    assert search("--trials", 1).code == 1
    last = lines(tmp_path / "nas.db.tiny.log.jsonl")[-1]
    assert (last["level"], last["event"], last["error"]) == ("error", "search_failed", "ZeroDivisionError")
    assert "_open_new" in last["traceback"] or "broken" in last["traceback"]
    assert last["message"] == "near postgresql://me:***@db/nas" and "canary" not in last["traceback"]


def test_a_full_disk_costs_the_log_and_not_the_search(search: Run) -> None:
    said = search("--trials", 2, "--log-file", "/dev/full")
    assert said.code == 0 and said.err.count("/dev/full cannot be written") == 1


@pytest.mark.parametrize("level", ["loud", "WARN", ""])
def test_an_unknown_level_is_refused(
    refused: Callable[..., str], config_file: Callable[..., str], url: str, level: str
) -> None:
    err = refused("search", "--config", config_file(), "--storage", url, f"--log-level={level}")
    assert f"log_level = {level!r} is not valid" in err and "'warning'" in err
