"""Bad input: one or two clear lines that name the value and the way out, the right exit code, nothing half-written."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nas import prices
from nas.workers import inline
from storage.store import Store
from trainers.evaluate import Job
from trainers.outcome import Outcome
from trainers.tasks import corpus

Refused = Callable[..., str]
Run = Callable[..., Any]


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("kdaa", ['no mixer "kdaa"', "did you mean kda", "     ^"]),
        ("2*full windwo", ['no mixer "windwo"', "did you mean window", "            ^"]),
        ("kda[heds=4]", ['kda has no setting "heds"', "did you mean heads"]),
        ("full[kv_heads=0]", ["kv_heads=0 is not valid"]),
        ("window[size=6]", ["size=6 is not valid", "multiple of 4"]),
        ("mla[rotary=2]", ["rotary=2 is not valid"]),
        ("3*(kda mla", ['"(" at position 3 is never closed', "     3*(kda mla", "       ^"]),
        ("kda mla)", ['")" at position 8 closes nothing']),
        ("kda[head_dim=64", ['"[" at position 4 is never closed']),
        ("", ["the layout is empty", "write at least one mixer"]),
        ("full/swigl", ['no channel mixer "swigl"', "did you mean swiglu"]),
        ("999999*kda", ["count 999999 is not between"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["cost", "evaluate"])
def test_a_layout_that_cannot_be_read(refused: Refused, layout: str, said: list[str], command: str) -> None:
    err = refused(command, layout)
    assert err.startswith("nas: layout: ")
    for words in said:
        assert words in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("full", "--width", 60), ["width 60 is not valid", "multiple of 8", "64"]),
        (("full", "--width", 0), ["--width: '0' is not valid", "at least 1"]),
        (("full", "--width", "wide"), ["--width: 'wide' is not a quantity", "32k"]),
        (("full", "--context", 0), ["--context: '0' is not valid", "at least 1"]),
        (("full", "--context=-4"), ["--context", "-4"]),
        (("full", "--context", "1.5"), ["--context", "whole number"]),
        (("full", "--batch", 0), ["--batch: '0'"]),
        (("full", "--batch=-1"), ["--batch", "-1"]),
        (("full", "--depth", 0), ["--depth: '0'"]),
        (("full", "--dtype", "int8"), ["dtype 'int8' is unknown", "bfloat16"]),
        (("full", "--fill", "stak"), ["fill 'stak' is unknown", "stretch"]),
        (("kda[heads=3,head_dim=40]/swiglu[ratio=9]", "--width", 64), ["ratio=9 is not valid"]),
        (("full[heads=4,kv_heads=3]", "--width", 64), ["kv_heads", "3", "4"]),
        ((), ["Missing argument", "layout"]),
        (("full", "--contxt", "32k"), ["No such option", "--contxt"]),
    ],
)
def test_a_cost_that_cannot_be_told(refused: Refused, arguments: tuple[object, ...], said: list[str]) -> None:
    err = refused("cost", *arguments)
    for words in said:
        assert words in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--workers", 0), ["workers = 0 is not valid", "greater than or equal to 1"]),
        (("--trials", 0), ["trials = 0 is not valid"]),
        (("--trials", -3), ["trials = -3 is not valid"]),
        (("--seed", -1), ["seed = -1 is not valid"]),
        (("--seed", 2**70), [f"seed = {2**70} is not valid"]),
        (("--sampler", "tpee"), ["no sampler 'tpee'; did you mean tpe"]),
        (("--pool", "threads"), ["pool = 'threads' is not valid"]),
        (("--set", "target.context=0"), ["target.context = 0 is not valid"]),
        (("--set", "target.widht=64"), ["unknown key target.widht; did you mean width"]),
        (("--set", "target.width"), ["'target.width' is not understood", "target.width=2048"]),
        (("--set", "target.width=60"), ["width 60 is not valid: it must be a multiple of 8"]),
        (("--set", "proxy.width=20"), ["width 20 is not valid: it must be a multiple of 8"]),
        (("--set", "space.mixers=[]"), ["the space is empty", "allow at least one mixer"]),
        (("--set", "space.mixers=[fulll]", "--set", "space.settings={}"), ["no mixer or family 'fulll'; did you mean full"]),
        (("--set", "space.settings.kda.head_dim=[12]"), ["head_dim=12 is not valid"]),
        (("--constraint", "full>=1", "--constraint", "full<=0"), ["the space is empty", "loosen one of them"]),
        (("--constraint", "kv_bytes<=1"), ["no layout of the space comes below 8KiB", "loosen"]),
        (("--constraint", "kv_byte<=1MiB"), ["no mixer, family or cost 'kv_byte'", "did you mean kv_bytes"]),
        (("--constraint", "no full please"), ["constraint 'no full please' is not understood"]),
        (("--set", "proxy.length=3"), ["mqar: length 3 is too short", "use at least"]),
        (("--set", "tasks.copy.steps=1"), ["no task 'copy'", "mqar, bytes"]),
        (("--set", "target.device=cuda:9"), ["device 'cuda:9' cannot be used here"]),
        (("--set", "objectives=[quality, latency]"), ["no objective 'latency'; did you mean latency_ms"]),
        (("--config", "no-such-file.yaml"), ["no-such-file.yaml cannot be read: No such file"]),
    ],
)  # fmt: skip
def test_a_search_that_cannot_be_meant(
    refused: Refused, config_file: Callable[..., str], tmp_path: Path,
    arguments: tuple[object, ...], said: list[str],
) -> None:  # fmt: skip
    given = arguments if "--config" in arguments else ("--config", config_file(), *arguments)
    err = refused("search", "--storage", f"sqlite:///{tmp_path}/new.db", *given)
    for words in said:
        assert words in err


def test_a_refused_search_leaves_no_study(
    refused: Refused, run: Run, config_file: Callable[..., str], url: str
) -> None:
    run("search", "--config", config_file(), "--storage", url, "--trials", 1)
    refused(
        "search", "--config", config_file(), "--storage", url, "--study", "new", "--constraint", "kv_bytes<=1"
    )
    with Store.open(url, read_only=True) as store:
        assert [study.name for study in store.studies()] == ["tiny"]


def test_a_file_with_a_wrong_key(refused: Refused, config_file: Callable[..., str], url: str) -> None:
    err = refused("search", "--storage", url, "--config", config_file({"proxy": {"widht": 8}}))
    assert "unknown key proxy.widht; did you mean width" in err


@pytest.fixture
def text_config(config_file: Callable[..., str]) -> str:
    return config_file({"tasks": {"bytes": {"steps": 1, "batch": 2, "learning_rates": [0.01]}}})


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.txt", None, "there is no file or folder"),
        ("short.txt", b"only this", "holds 9 bytes of text; at least 1024 are needed"),
        ("empty.txt", b"", "holds 0 bytes of text"),
        ("latin.txt", b"good line\n" * 500 + b"caf\xe9\n", "latin.txt:501 is not UTF-8 text"),
        (
            "bad.jsonl",
            b'{"text": "fine"}\n{"txt": "wrong"}\n',
            'bad.jsonl:2 is no JSON object with a "text" field',
        ),
        ("deep.jsonl", b'{"text": "fine"}\n' + b"[" * 200_000, "deep.jsonl:2 is no JSON object"),
        ("long.jsonl", b'{"n": ' + b"9" * 9000 + b', "text": "x"}', "long.jsonl:1 is no JSON object"),
        ("utf16.txt", ("words " * 500).encode("utf-16"), "utf16.txt:1 is not UTF-8 text"),
        ("half.txt", b"a line\n" * 500 + "é".encode()[:1], "half.txt:501 is not UTF-8 text"),
    ],
)
def test_fault_35_bad_data_is_refused_with_its_place(
    refused: Refused, text_config: str, tmp_path: Path, url: str, name: str, content: bytes | None, said: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    search = ("search", "--config", text_config, "--storage", url)
    evaluate = ("evaluate", "full", "--config", text_config, "--task", "bytes")
    for command in (search, evaluate):
        err = refused(*command, "--data", path)
        assert not Path(url.removeprefix("sqlite:///")).exists(), (
            "a search that never began leaves no database"
        )
        assert said in err and name in err


def test_fault_35_empty_folder_of_data_is_refused(
    refused: Refused, text_config: str, tmp_path: Path, url: str
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / ".hidden").write_text("x" * 9000)
    err = refused("search", "--config", text_config, "--storage", url, "--data", tmp_path / "texts")
    assert "is empty; put .txt, .jsonl or other text files into it" in err


def test_a_name_that_is_no_utf8_is_read_all_the_same(
    run: Run, text_config: str, tmp_path: Path, url: str
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    name = os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")
    Path(name).write_text("the cat sat on the mat. " * 400)
    assert run("search", "--config", text_config, "--storage", url, "--data", folder, "--trials", 1).code == 0


def test_ones_own_text_works(run: Run, text_config: str, tmp_path: Path, url: str) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"page {number}: the cat sat on the mat. " * 20)
    said = run("search", "--config", text_config, "--storage", url, "--data", folder, "--trials", 2, "--json")
    assert said.code == 0 and said.json["trials"]["done"] == 2
    said = run("show", 0, "--study", "tiny", "--storage", url, "--json")
    assert said.json["details"]["data"]["source"] == str(folder)
    assert len(said.json["details"]["data"]["sha256"]) == 64


def test_fault_34_data_that_changed_is_refused_by_its_hash(
    run: Run, refused: Refused, text_config: str, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(b"the cat sat on the mat. " * 400)
    arguments = ("search", "--config", text_config, "--storage", url, "--data", path)
    assert run(*arguments, "--trials", 1).code == 0
    before = corpus.load(str(path)).sha256
    path.write_bytes(b"the cat sat on the hat. " + b"the cat sat on the mat. " * 399)  # as long as it was
    corpus.load.cache_clear()
    after = corpus.load(str(path)).sha256
    for going_on in (arguments, ("search", "--study", "tiny", "--storage", url, "--workers", 1)):
        err = refused(*going_on, "--trials", 2)
        assert f'data_sha256: "{before}", now "{after}"' in err and "another --study name" in err
    # A worker reads the file by itself, perhaps much later.
    path.write_bytes(b"the cat sat on the mat. " * 400)
    corpus.load.cache_clear()
    real = inline.run_job

    def later(job: Job) -> Outcome:
        path.write_bytes(b"the cat sat on the hat. " + b"the cat sat on the mat. " * 399)
        corpus.load.cache_clear()
        return real(job)

    with monkeypatch.context() as patched:
        patched.setattr(inline, "run_job", later)
        said = run(*arguments, "--trials", 2)
    assert said.code == 2 and f"sha256 {before} here, {after} there" in said.err
    stored = run("trials", "--study", "tiny", "--storage", url, "--json").json
    assert [trial["state"] for trial in stored] == ["done", "running"]
    path.write_bytes(b"the cat sat on the mat. " * 400)
    corpus.load.cache_clear()
    assert run(*arguments, "--trials", 2).code == 0
    stored = run("trials", "--study", "tiny", "--storage", url, "--json").json
    assert [trial["state"] for trial in stored] == ["done", "done"]


@pytest.mark.parametrize("command", ["search", "front", "trials", "report", "dashboard", "show", "explain"])
@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("missing/folder/nas.db", "there is no directory"),
        ("a-directory", ""),
        ("words.db", "no SQLite database"),
    ],
)
def test_a_database_that_cannot_be_used(
    refused: Refused, config_file: Callable[..., str], tmp_path: Path, command: str, place: str, said: str
) -> None:
    (tmp_path / "a-directory").mkdir()
    (tmp_path / "words.db").write_text("these are only words " * 50)
    more = {"search": ("--config", config_file()), "show": (0,), "report": ("-o", tmp_path / "r.html")}
    before = sorted(os.listdir(tmp_path))
    err = refused(command, *more.get(command, ()), "--storage", f"sqlite:///{tmp_path}/{place}", code=3)
    assert place in err and (said in err or command != "search")
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "words.db").read_text().startswith("these are only words")


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("nas.db", "is a path, not a database URL: write sqlite:///nas.db"),
        ("mysql://host/nas", "names no database that is spoken here"),
        ("postgresql://me:canary7f3e@127.0.0.1:9/nas", "check that the server runs"),
    ],
)
def test_an_address_that_is_no_database(refused: Refused, storage: str, said: str) -> None:
    err = refused("trials", "--storage", storage, code=3)
    assert said in err and "canary7f3e" not in err


def test_a_database_that_another_search_is_writing_to(
    run: Run, config_file: Callable[..., str], url: str
) -> None:
    arguments = ("search", "--config", config_file(), "--storage", url)
    run(*arguments, "--trials", 1)
    with Store.open(url) as store:
        study = store.study("tiny")
        assert study is not None
        with store.writer(study):
            said = run(*arguments, "--trials", 2)
    assert said.code == 3 and "nas: " in said.err and "Traceback" not in said.err
    assert run(*arguments, "--trials", 2).code == 0


def test_the_same_text_may_lie_elsewhere_when_a_study_goes_on(
    run: Run, refused: Refused, text_config: str, tmp_path: Path, url: str
) -> None:
    first, second = tmp_path / "here", tmp_path / "there"
    for folder in (first, second):
        folder.mkdir()
        (folder / "mine.txt").write_bytes(b"the cat sat on the mat. " * 400)
    arguments = ("search", "--config", text_config, "--storage", url, "--data")
    assert run(*arguments, first, "--trials", 1).code == 0
    assert run(*arguments, second, "--trials", 2).code == 0
    (second / "more.txt").write_bytes(b"and on the hat. " * 9)
    corpus.load.cache_clear()
    err = refused(*arguments, second, "--trials", 3)
    assert f'data: "{first}", now "{second}"' in err and "data_sha256: " in err
    (first / "mine.txt").unlink()
    first.rmdir()
    gone = refused("search", "--study", "tiny", "--storage", url, "--workers", 1, "--trials", 3)
    assert str(first) in gone


@pytest.mark.parametrize("objectives", [["quality", "latency_ms"], ["quality", "kv_bytes"]])
def test_latencies_of_another_machine_are_not_mixed_without_a_word(
    run: Run,
    config_file: Callable[..., str],
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    objectives: list[str],
) -> None:
    arguments = ("search", "--config", config_file({"objectives": objectives}), "--storage", url, "--trials")
    assert "warning" not in run(*arguments, 1).err and "warning" not in run(*arguments, 2).err
    monkeypatch.setattr(prices, "device_name", lambda _: "cpu: another one")
    said = run(*arguments, 3)
    assert said.code == 0
    told = (
        "latencies were measured on cpu: " in said.err
        and "those of cpu: another one do not compare" in said.err
    )
    assert told == ("latency_ms" in objectives)


def test_fault_33_configuration_changed_on_resume_is_refused_with_the_difference(
    refused: Refused, run: Run, config_file: Callable[..., str], url: str
) -> None:
    arguments = ("search", "--config", config_file(), "--storage", url)
    run(*arguments, "--trials", 2)
    before = run("trials", "--study", "tiny", "--storage", url, "--json").json
    err = refused(*arguments, "--trials", 4, "--seed", 3, "--set", "proxy.width=24")
    assert "proxy.width: 16, now 24" in err and "seed: 0, now 3" in err and "another --study name" in err
    err = refused(*arguments, "--set", "space.mixers=[full, kda]")
    assert 'space.mixers: ["full", "window", "kda"], now ["full", "kda"]' in err
    err = refused(*arguments, "--constraint", "full>=1")
    assert 'space.constraints: [], now ["full>=1"]' in err
    edited = config_file({"proxy": {"length": 24}, "tasks": {"mqar": {"steps": 3}}})
    err = refused("search", "--config", edited, "--storage", url)
    assert "proxy.length: 16, now 24" in err and "tasks.mqar.steps: 2, now 3" in err
    config_file()
    assert run("trials", "--study", "tiny", "--storage", url, "--json").json == before
    assert run(*arguments, "--trials", 2, "--set", "attempts=2", "--set", "time_limit_s=99").code == 0


@pytest.mark.parametrize("command", ["front", "trials", "report", "dashboard", "show", "explain"])
def test_an_unknown_study_is_refused_with_those_that_are_there(
    refused: Refused, run: Run, config_file: Callable[..., str], url: str, command: str
) -> None:
    run("search", "--config", config_file(), "--storage", url, "--trials", 1)
    number = (0,) if command == "show" else ()
    err = refused(command, *number, "--study", "tiney", "--storage", url)
    assert "no study 'tiney'" in err and "did you mean tiny" in err and "there are tiny" in err


def test_an_unknown_trial_or_state(
    refused: Refused, run: Run, config_file: Callable[..., str], url: str
) -> None:
    run("search", "--config", config_file(), "--storage", url, "--trials", 1)
    place = ("--study", "tiny", "--storage", url)
    assert "has no trial 9: it has 1, counted from 0" in refused("show", 9, *place)
    assert "no state 'don'; did you mean done" in refused("trials", "--state", "don", *place)
    assert "'trial'" in refused("show", "nine", *place)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("full", "--task", "mqarr"), "no task 'mqarr'; did you mean mqar"),
        (("full", "--task", "mqar", "--steps", 0), "--steps: '0' is not valid"),
        (("full", "--task", "mqar", "--width", 20), "width 20 is not valid"),
        (("full", "--task", "mqar", "--length", 3), "length 3 is too short"),
        (("full", "--task", "mqar", "--learning-rate", 0), "learning_rates.0 = 0.0 is not valid"),
        (("full", "--task", "mqar", "--seed", -1), "--seed"),
        (("full", "--task", "mqar", "--device", "cuda:9"), "device 'cuda:9' cannot be used here"),
        (("full[heads=4,kv_heads=3]", "--task", "mqar", "--literal", "--width", 16), "kv_heads"),
    ],
)
def test_an_evaluation_that_cannot_be_done(
    refused: Refused, arguments: tuple[object, ...], said: str
) -> None:
    assert said in refused("evaluate", *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("kdaa",), 'no mixer "kdaa"'),
        (("full", "--context", 0), "--context: '0'"),
        (("full", "--prompt", 0), "--prompt: '0'"),
        (("full", "--device", "gpu"), "device 'gpu' cannot be used here"),
        (("full", "--dtype", "int8"), "dtype"),
    ],
)
def test_a_measurement_that_cannot_be_done(
    refused: Refused, arguments: tuple[object, ...], said: str
) -> None:
    assert said in refused("measure", *arguments, "--set", "latency_cache=null")


def test_a_port_in_use_and_a_short_token(
    refused: Refused, run: Run, config_file: Callable[..., str], url: str
) -> None:
    run("search", "--config", config_file(), "--storage", url, "--trials", 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        err = refused("dashboard", "--storage", url, "--port", port)
        assert f"cannot listen on 127.0.0.1:{port}" in err and "--port 0" in err
    assert "the token is too short" in refused("dashboard", "--storage", url, "--token", "abc")
    assert "65535" in refused("dashboard", "--storage", url, "--port", 70000)


def test_a_report_that_cannot_be_written(
    refused: Refused, run: Run, config_file: Callable[..., str], url: str, tmp_path: Path
) -> None:
    run("search", "--config", config_file(), "--storage", url, "--trials", 1)
    err = refused("report", "--study", "tiny", "--storage", url, "-o", tmp_path / "no" / "such" / "r.html")
    assert "cannot be written: No such file or directory" in err


def test_an_unknown_command_is_refused(refused: Refused) -> None:
    assert "serch" in refused("serch")


def test_a_bug_is_named_as_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("nobody thought of this")

    monkeypatch.setattr("nas.prices.cost_json", broken)
    said = run("cost", "full")
    assert said.code == 1 and said.out == ""
    assert "internal error, ZeroDivisionError: nobody thought of this" in said.err and "--debug" in said.err
    said = run("--debug", "cost", "full")
    assert said.code == 1 and said.out == ""
    assert "Traceback" in said.err and "ZeroDivisionError: nobody thought of this" in said.err
