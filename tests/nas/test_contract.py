"""The commands as others script against them: exact keys, one JSON value on standard output, the same answer twice."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy import text as sql

from nas.cli.main import app
from nas.mixer_table import BEGIN, END, markdown, renewed
from nas.workers import inline
from search_space.presets import PRESETS
from search_space.vocabulary import CHANNELS, VOCABULARY, read
from trainers.evaluate import Job
from trainers.outcome import Outcome, Unfit

Run = Callable[..., Any]
FRONT_KEYS = {
    "trial", "layout", "quality", "quality_interval", "seeds", "front_probability", "latency_ms", "kv_bytes", "params",
    "scores", "origin",
}  # fmt: skip


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that were really trained."""
    jobs: list[Job] = []
    real = inline.run_job

    def counting(job: Job) -> Outcome:
        jobs.append(job)
        return real(job)

    monkeypatch.setattr(inline, "run_job", counting)
    return jobs


@pytest.fixture
def search(run: Run, config_file: Callable[..., str], url: str) -> Run:
    """`nas search` on the tiny configuration."""
    path = config_file()

    def call(*arguments: object, storage: str = url) -> Any:
        return run("search", "--config", path, "--storage", storage, *arguments)

    return call


def test_search_answers_with_one_object(search: Run, url: str) -> None:
    said = search("--json")
    assert said.code == 0
    assert set(said.json) == {"study", "storage", "trials", "hypervolume", "front", "rungs"}
    assert said.json["rungs"] is None
    assert (said.json["study"], said.json["storage"]) == ("tiny", url)
    counts = {"done": 6, "waiting": 0, "running": 0, "pruned": 0, "unfit": 0, "lost": 0, "quarantined": 0}
    assert said.json["trials"] == counts
    assert 0 <= said.json["hypervolume"] <= 1
    assert said.json["front"] and all(set(row) == FRONT_KEYS for row in said.json["front"])
    assert said.out.count("\n") == 1
    assert "Next:" not in said.err and "[6/6]" in said.err


def test_front_and_trials_answer_with_lists(search: Run, run: Run, url: str) -> None:
    found = search("--json").json["front"]
    place = ("--study", "tiny", "--storage", url, "--json")
    front = run("front", *place)
    assert front.code == 0 and front.json == found
    trials = run("trials", *place).json
    assert [trial["trial"] for trial in trials] == list(range(6))
    needed = {"trial", "layout", "state", "attempts", "scores", "origin"}
    for trial in trials:
        assert needed <= set(trial)
        assert trial["state"] == "done" and trial["attempts"] == 1
        assert set(trial["scores"]) == {"mqar"} and 0 <= trial["scores"]["mqar"] <= 1
        assert str(read(trial["layout"])) == trial["layout"]
        assert isinstance(trial["kv_bytes"], int) and isinstance(trial["params"], int)
    origins = {trial["origin"] for trial in trials}
    assert "uniform" in origins and origins <= {"uniform", "search", *PRESETS}
    assert run("trials", *place, "--state", "unfit", "--state", "lost").json == []
    shown = run("show", 2, *place).json
    assert {"on_front", "costs", "layer_costs", "details", "repeats", *trials[2]} == set(shown)
    assert {key: shown[key] for key in trials[2]} == trials[2]
    assert shown["costs"]["kv_bytes"] == trials[2]["kv_bytes"]
    assert shown["on_front"] == (2 in [row["trial"] for row in found])


def answers(run: Run, url: str) -> Any:
    """What a study says, without the seconds that it took."""
    place = ("--study", "tiny", "--storage", url, "--json")
    trials = run("trials", *place).json
    for trial in trials:
        del trial["train_s"], trial["worker_s"]
    return trials, run("front", *place).json


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2"])
def test_the_same_seed_gives_the_same_study_twice(
    search: Run, run: Run, tmp_path: Path, sampler: str
) -> None:
    first, second, other = (f"sqlite:///{tmp_path}/{name}.db" for name in ("first", "second", "other"))
    both = [
        search("--json", "--sampler", sampler, "--trials", 10, storage=url).json for url in (first, second)
    ]
    assert answers(run, first) == answers(run, second)
    assert both[0]["hypervolume"] == both[1]["hypervolume"]
    search("--json", "--sampler", sampler, "--trials", 10, "--seed", 1, storage=other)
    assert answers(run, other) != answers(run, first)


def test_going_on_trains_only_the_new_trials(search: Run, run: Run, trained: list[Job], url: str) -> None:
    search("--trials", 4)
    first = answers(run, url)[0]
    assert len(trained) == 4
    said = search("--trials", 6, "--json")
    assert len(trained) == 6 and said.json["trials"]["done"] == 6
    assert answers(run, url)[0][:4] == first
    assert search("--trials", 6, "--json").json == said.json
    assert len(trained) == 6
    said = search("--trials", 2, "--json")
    assert said.code == 0 and said.json["trials"]["done"] == 6 and len(trained) == 6


def test_a_study_goes_on_by_its_name_alone(search: Run, run: Run, trained: list[Job], url: str) -> None:
    search("--trials", 3)
    said = run(
        "search", "--study", "tiny", "--storage", url, "--trials", 5, "--workers", 1, "--repeats", 0, "--json"
    )
    assert said.code == 0 and said.json["trials"]["done"] == 5 and len(trained) == 5


def test_a_study_from_before_a_key_was_known_goes_on(search: Run, run: Run, url: str) -> None:
    assert search().code == 0
    engine = create_engine(url)
    with engine.begin() as connection:
        text = connection.execute(sql("SELECT config FROM nas_studies")).scalar_one()
        config = json.loads(text)
        del config["target"]["rotary_scaling"], config["target"]["rotary_length"]
        connection.execute(sql("UPDATE nas_studies SET config = :config"), {"config": json.dumps(config)})
    engine.dispose()
    place = ("--study", "tiny", "--storage", url, "--workers", 1, "--trials", 5)
    assert run("search", *place).code == 0
    said = run("search", *place, "--set", "target.rotary_scaling=yarn", "--set", "target.rotary_factor=2")
    assert said.code == 2 and 'target.rotary_scaling: "none", now "yarn"' in said.err


def test_another_study_of_the_database_reuses_what_is_known(search: Run, trained: list[Job]) -> None:
    first = search("--json").json
    count = len(trained)
    second = search("--json", "--study", "second").json
    assert len(trained) == count == 6
    assert second["front"] == first["front"] and second["study"] == "second"


def test_a_study_without_one_valid_trial_ends_with_4(
    search: Run, run: Run, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inline, "run_job", lambda _job: Unfit(why="the loss is nan at step 1"))
    said = search("--json")
    assert said.code == 4 and said.json["trials"]["unfit"] == 6 and said.json["front"] == []
    assert said.json["hypervolume"] == 0.0
    assert "no trial ended well" in said.err
    front = run("front", "--study", "tiny", "--storage", url, "--json")
    assert (front.code, front.json) == (4, [])


def test_a_used_up_space_is_said(search: Run) -> None:
    said = search("--trials", 400, "--json")
    assert said.code == 0 and "every layout of the space has been tried" in said.err


def test_constraints_that_no_start_keeps_and_many_sizes(
    run: Run, config_file: Callable[..., str], url: str
) -> None:
    space = {
        "layers": 2,
        "mixers": ["window", "kda"],
        "settings": {"window": {"size": [4 * n for n in range(1, 71)]}, "kda": {"head_dim": [16]}},
        "constraints": ["window>=1", "kda>=1"],
    }
    said = run("search", "--config", config_file({"space": space, "trials": 2}), "--storage", url, "--json")
    assert said.code == 0 and said.json["trials"]["done"] == 2


def test_for_people_it_says_what_it_does_and_what_comes_next(search: Run, run: Run, url: str) -> None:
    said = search()
    assert said.code == 0
    for word in ("space ", "target ", "quality ", "Ctrl-C stops cleanly", "[6/6]", "Next:  nas show"):
        assert word in said.err
    assert "Front (" in said.out and "cache 32" in said.out and "cache 128" in said.out
    table = run("trials", "--study", "tiny", "--storage", url)
    assert table.code == 0 and "2*window" in table.out
    shown = run("show", 0, "--study", "tiny", "--storage", url)
    assert "inside the training loop" in shown.out and "nas cost '2*full'" in shown.out
    assert run("front", "--study", "tiny", "--storage", url).out.strip().startswith("Front (")


def test_a_study_name_with_a_blank_is_quoted_in_what_comes_next(search: Run) -> None:
    said = search("--study", "my study", "--trials", 1)
    assert "--study 'my study'" in said.err


def test_evaluate_answers_with_one_object(run: Run, config_file: Callable[..., str]) -> None:
    arguments = ("kda full", "--task", "mqar", "--steps", 3, "--width", 16, "--length", 16, "--seed", 5)
    said = run("evaluate", *arguments, "--batch", 4, "--config", config_file(), "--json")
    assert said.code == 0
    assert {"layout", "task", "scores", "steps", "tokens", "train_s"} <= set(said.json)
    assert (said.json["layout"], said.json["task"], said.json["steps"]) == ("kda full", "mqar", 3)
    assert said.json["tokens"] == 3 * 4 * 16 and set(said.json["scores"]) == {"mqar"}
    assert said.json["seed"] == 5
    again = run("evaluate", *arguments, "--batch", 4, "--config", config_file(), "--json")
    assert again.json["details"]["curves"] == said.json["details"]["curves"]


def test_evaluate_shrinks_a_layout_unless_it_is_literal(run: Run) -> None:
    arguments = (
        "window[size=32]",
        "--task",
        "mqar",
        "--steps",
        1,
        "--width",
        16,
        "--length",
        16,
        "--batch",
        2,
    )
    target = ("--set", "target.train_length=64")
    shrunk = run("evaluate", *arguments, *target, "--json").json["trained_as"]
    literal = run("evaluate", *arguments, *target, "--literal", "--json").json["trained_as"]
    assert "size=8" in shrunk and "size=32" in literal


def test_evaluate_names_an_unfit_layout(run: Run) -> None:
    said = run(
        "evaluate", "full", "--task", "mqar", "--steps", 4, "--width", 16, "--length", 16, "--batch", 2,
        "--learning-rate", "1e38", "--json",
    )  # fmt: skip
    assert said.code == 4 and said.json["scores"] == {}
    assert "mqar, learning rate 1e+38" in said.json["unfit"] and "step" in said.json["unfit"]


def test_mixers_lists_the_vocabulary(run: Run) -> None:
    rows = {row["name"]: row for row in run("mixers", "--json").json}
    assert list(rows) == list(VOCABULARY)
    assert [row["name"] for row in run("mixers", "--channels", "--json").json] == list(CHANNELS)
    for row in rows.values():
        assert {"name", "family", "about", "reach", "source", "needs", "sequential", "settings"} == set(row)
        assert row["reach"] == VOCABULARY[row["name"]].reach
        assert row["needs"] == sorted(VOCABULARY[row["name"]].needs)
        assert row["sequential"] == VOCABULARY[row["name"]]().sequential
        for setting in row["settings"].values():
            assert {"options", "unit", "default"} <= set(setting)
    assert rows["window"]["settings"]["size"]["unit"] == "tokens"
    assert rows["kda"]["settings"]["head_dim"] == {
        "options": [64, 128, 256], "unit": "head", "default": None, "searched": True,
    }  # fmt: skip
    people = run("mixers").out
    assert all(f"{name}" in people for name in VOCABULARY)
    assert "reach window" in people and rows["window"]["about"] in people


def test_the_table_of_mixers_is_made_from_the_vocabulary(run: Run) -> None:
    said = run("mixers", "--markdown").out
    assert said == f"{markdown()}\n"
    head, _, *rows = (line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("|"))
    table = {row[0].strip("`"): dict(zip(head, row, strict=True)) for row in rows}
    assert list(table) == list(VOCABULARY)
    # By hand: 2 · 2048 keys and values of two bytes a token, or 512 of them; a matrix of 128 × 128 float32 a head.
    assert table["full"]["state"] == "64 MiB → 1 GiB" and table["full"]["reach"] == "all"
    assert table["window"]["state"] == "4 MiB" and table["window"]["reach"] == "window"
    assert table["lightning"]["state"] == "1 MiB" and table["lightning"]["reach"] == "state"
    assert all(row["what it is"] and not row["what it is"].endswith(".") for row in table.values())
    for other in ("--channels", "--json"):
        refused = run("mixers", "--markdown", other)
        assert refused.code == 2 and "stands alone" in refused.err


def test_only_what_stands_between_the_marks_is_renewed() -> None:
    text = f"before\n{BEGIN}\n| old |\n{END}\nafter\n"
    assert renewed(text) == f"before\n{BEGIN}\n{markdown()}\n{END}\nafter\n" == renewed(renewed(text))
    for spoilt in ("no marks", f"{END}{BEGIN}", f"{BEGIN}", f"{BEGIN}{BEGIN}{END}", f"{BEGIN}{END}{END}"):
        with pytest.raises(ValueError, match="once each"):
            renewed(spoilt)


def cost(run: Run, layout: str, *arguments: object) -> Any:
    said = run("cost", layout, *arguments, "--json")
    assert said.code == 0, said.err
    return said.json


def test_cost_answers_with_one_object(run: Run) -> None:
    answer = cost(run, "2*full", "--width", 64, "--context", 128, "--context", "1k", "--batch", 3)
    assert {"layout", "layers", "params", "flops_per_token", "cache"} <= set(answer)
    assert set(answer["flops_per_token"]) == {"prefill", "decode"}
    assert [entry["context"] for entry in answer["cache"]] == [128, 1024]
    for entry in answer["cache"]:
        assert {"context", "stored_bytes", "read_bytes", "by_layer"} <= set(entry)
        assert len(entry["by_layer"]) == answer["layers"] == 2
        assert entry["stored_bytes"] == 2 * entry["context"] * 3 * 2 * 64 * 2


@pytest.mark.parametrize(
    ("layout", "arguments", "token", "fixed"),
    [
        # 16 heads of 128, keys and values, two bytes each: 8192 bytes a token and layer.
        ("full", ("--width", 2048), 8192, 0),
        ("full[kv_heads=4]", ("--width", 2048), 2048, 0),
        ("full", ("--width", 2048, "--dtype", "float32"), 16384, 0),
        # 512 numbers of the latent and 64 of the shared key: 1152 bytes.
        ("mla[heads=32,head_dim=128,rank=512,shared=64]", ("--width", 2304), 1152, 0),
        ("mla[heads=32,head_dim=128,rank=512,shared=64,rotary=0]", ("--width", 2304), 1152, 0),
        # 32 matrices of 128 by 128 in float32, and three tokens of 3 * 4096 channels: 2.10 MB and 74 kB.
        ("kda[heads=32,head_dim=128]", ("--width", 2304), 0, 2_097_152 + 73_728),
        ("window[size=1024]", ("--width", 2048), 0, 1024 * 8192),
    ],
)  # fmt: skip
def test_costs_that_are_known_by_hand(
    run: Run, layout: str, arguments: tuple[object, ...], token: int, fixed: int
) -> None:
    entries = cost(run, layout, "--context", "8k", "--context", "128k", *arguments)["cache"]
    assert [entry["stored_bytes"] for entry in entries] == [token * 8192 + fixed, token * 131072 + fixed]
    double = cost(run, f"2*{layout}", "--context", "8k", "--batch", 2, *arguments)["cache"]
    assert double[0]["stored_bytes"] == 4 * entries[0]["stored_bytes"]


@pytest.mark.parametrize(
    ("preset", "at_8k", "at_128k"),
    [
        ("llama-3", 2**30, 2**34),
        ("mistral", 2**29, 2**29),
        ("kimi-linear", 7 * 8192 * 1152 + 20 * 2_170_880, 7 * 131072 * 1152 + 20 * 2_170_880),
    ],
)
def test_presets_cost_what_they_are_published_with(run: Run, preset: str, at_8k: int, at_128k: int) -> None:
    answer = cost(run, preset, "--context", "8k", "--context", "128k")
    assert [entry["stored_bytes"] for entry in answer["cache"]] == [at_8k, at_128k]


def test_cost_takes_depth_and_people_read_units(run: Run) -> None:
    stacked = cost(run, "3*kda mla", "--width", 64, "--depth", 6)
    assert (stacked["layers"], stacked["layout"]) == (6, "3*kda mla 2*kda")
    stretched = cost(run, "kda mla", "--width", 64, "--depth", 4, "--fill", "stretch")
    assert stretched["layout"] == "2*kda 2*mla"
    said = run("cost", "full", "--width", 2048, "--context", "8k")
    assert "64 MiB" in said.out and "67108864 bytes" in said.out


def test_space_answers_with_one_object(run: Run, config_file: Callable[..., str]) -> None:
    said = run("space", "--config", config_file(), "--constraint", "full>=1", "--draw", 4, "--json")
    answer = said.json
    assert said.code == 0 and answer["exact"] and answer["layers"] == 2
    assert len(answer["drawn"]) == 4 and all("full" in text for text in answer["drawn"])
    assert answer["constraints"] == ["full>=1"]
    assert {start["origin"] for start in answer["starts"]} >= {"uniform"}
    assert run("space", "--config", config_file(), "--draw", 0, "--json").json["size"] > answer["size"]
    assert "patterns of 2 layers" in run("space", "--config", config_file()).out


def test_a_space_is_named_by_mixers_families_layers_or_all_of_them(run: Run) -> None:
    def entries(*arguments: object) -> list[str]:
        result = run("space", *arguments, "--layers", 2, "--draw", 0, "--json")
        assert result.code == 0
        return list(json.loads(result.out)["entries"])

    assert entries("--space", "kda full") == entries("--space", "kda", "--space", "full") == ["kda", "full"]
    assert entries("--space", "kda|full mla") == ["kda|full", "mla"]
    assert set(entries("--space", "sparse")) == {n for n in VOCABULARY if VOCABULARY[n].family == "sparse"}
    assert entries("--space", "all") == list(VOCABULARY)
    refused = run("space", "--space", "al")
    assert refused.code == 2 and "did you mean all" in refused.err


def test_measure_answers_with_one_object(run: Run, latencies: Any, config_file: Callable[..., str]) -> None:
    said = run("measure", "2*full kda", "--config", config_file(), "--prompt", 8, "--json")
    answer = said.json
    assert said.code == 0 and answer["layers"] == 3 and answer["prompt"] == 8
    assert [(row["layer"], row["count"]) for row in answer["by_layer"]] == [("full", 2), ("kda", 1)]
    assert answer["decode_ms"] == pytest.approx(
        sum(row["count"] * row["decode_ms"] for row in answer["by_layer"])
    )
    assert answer["decode_whole_ms"] > answer["decode_ms"]
    assert "whole 2*full kda" in latencies.asked
    fewer = run("measure", "full", "--config", config_file(), "--no-whole", "--json").json
    assert "decode_whole_ms" not in fewer


def test_doctor_tries_the_real_thing(run: Run, url: str) -> None:
    said = run("doctor", "--storage", url, "--json")
    assert said.code == 0
    findings = {item["check"]: item for item in said.json}
    assert set(findings) == {"python", "packages", "device", "kernels", "storage", "trial"}
    assert "six mixers" in findings["trial"]["said"]


def test_report_writes_one_file(search: Run, run: Run, url: str, tmp_path: Path) -> None:
    search()
    page = tmp_path / "report.html"
    said = run("report", "--study", "tiny", "--storage", url, "-o", page)
    assert said.code == 0 and said.out == ""
    text = page.read_text()
    assert "<html" in text and "2*full" in text
    assert not re.search(r'<(script|img|iframe)[^>]*\ssrc="(?!data:)|<link[^>]*\shref="(?!data:)', text)


def test_every_command_and_option_has_help() -> None:
    import typer

    group = typer.main.get_command(app)
    commands = getattr(group, "commands")  # noqa: B009
    assert set(commands) == {
        "search", "front", "trials", "retry", "show", "explain", "cost", "measure", "evaluate", "mixers", "space", "report",
        "dashboard", "db", "doctor", "warm", "tune",
    }  # fmt: skip
    below = commands["db"].commands
    assert set(below) == {"status", "upgrade", "check"}
    commands = commands | {f"db {name}": command for name, command in below.items()}
    bare = [
        f"{name} {parameter.name}"
        for name, command in commands.items()
        for parameter in command.params
        if not getattr(parameter, "help", None)
    ]
    assert bare == []
    assert all(command.help for command in commands.values())


def test_json_is_plain_numbers_in_ascii_order(search: Run) -> None:
    text = search("--json").out
    assert json.loads(text) == json.loads(text, parse_constant=lambda name: pytest.fail(name))
