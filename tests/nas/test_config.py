"""Configuration: layers of it, what is refused and in which words, what a study may not change."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nas.cli.options import given_layers
from nas.config import Config, assign, check, differences, hash_of, meaning, merge, read_file, resolve


@pytest.mark.parametrize(
    ("given", "names", "hint"),
    [
        ({"trails": 3}, "unknown key trails", "trials"),
        ({"target": {"widht": 64}}, "unknown key target.widht", "width"),
        ({"proxy": {"lenght": 64}}, "unknown key proxy.lenght", "length"),
        ({"space": {"mixer": ["full"]}}, "unknown key space.mixer", "mixers"),
        ({"tasks": {"mqar": {"stepps": 3}}}, "unknown key tasks.mqar.stepps", "steps"),
    ],
)
def test_unknown_keys_are_refused_at_every_level(given: dict[str, Any], names: str, hint: str) -> None:
    with pytest.raises(ValueError, match=names) as caught:
        resolve(given)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ({"workers": 0}, "workers = 0"),
        ({"trials": 0}, "trials = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**63}, f"seed = {2**63}"),
        ({"target": {"context": 0}}, "target.context = 0"),
        ({"target": {"width": -8}}, "target.width = -8"),
        ({"target": {"dtype": "int8"}}, "target.dtype = 'int8'"),
        ({"target": {"rotary_scaling": "dynamic"}}, "target.rotary_scaling = 'dynamic'"),
        ({"target": {"rotary_factor": 0.5}}, "target.rotary_factor = 0.5"),
        ({"target": {"contexts": [8192]}}, "target.contexts"),
        ({"proxy": {"weight_decay": -0.1}}, "proxy.weight_decay = -0.1"),
        ({"tasks": {"mqar": {"learning_rates": [0]}}}, "tasks.mqar.learning_rates.0 = 0"),
        ({"tasks": {"mqar": {"learning_rates": []}}}, "tasks.mqar.learning_rates"),
        ({"tasks": {}}, "tasks"),
        ({"pool": "threads"}, "pool = 'threads'"),
        ({"study": ""}, "study = ''"),
        ({"time_limit_s": 0}, "time_limit_s = 0"),
        ({"trials": "32q"}, "trials = '32q'"),
        ({"space": {"mixers": 3}}, "space.mixers = 3"),
    ],
)
def test_a_bad_value_is_named_with_its_place(given: dict[str, Any], place: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"configuration: {place}")) as caught:
        resolve(given)
    assert len(str(caught.value).splitlines()) <= 2


def test_sizes_are_read_as_people_write_them() -> None:
    config = resolve({"target": {"context": "128k", "contexts": ["1k", 4096]}, "study": "12k"})
    assert config.target.context == 131072
    assert config.target.contexts == (1024, 4096)
    assert config.study == "12k"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target": {"width": 60}}, "multiple of 8"),
        ({"target": {"rotary_factor": 2}}, "1 where rotary_scaling is none"),
        ({"target": {"rotary_scaling": "yarn", "rotary_factor": 2}}, "yarn asks for the tokens"),
        ({"space": {"constraints": ["full=>1"]}}, "not understood"),
        ({"space": {"constraints": ["fulll>=1"]}}, "did you mean full"),
        ({"objectives": ["quality", "latencyms"]}, "did you mean latency_ms"),
        ({"objectives": ["kv_bytes", "params"]}, "name quality"),
        ({"objectives": ["quality", "quality"]}, "once"),
        ({"objectives": ["quality"]}, "at least one cost"),
        ({"space": {"layers": 5}, "target": {"depth": 4}}, "space.layers = 5 is more than target.depth = 4"),
    ],
)
def test_what_types_cannot_see_is_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(resolve(given))


def test_settings_follow_the_mixers_unless_given() -> None:
    assert set(resolve({"space": {"mixers": ["full", "kda"]}}).space.settings) == {"full", "kda"}
    assert set(resolve({"space": {"mixers": ["latent", "full"]}}).space.settings) == {"full", "mla"}
    given = {"full": {"kv_heads": (1,)}}
    assert resolve({"space": {"mixers": ["kda", "full"], "settings": given}}).space.settings == given


def test_yaml_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "search.yaml"
    with pytest.raises(ValueError, match=r"search\.yaml cannot be read: No such file"):
        read_file(path)
    path.write_text("target: [1, 2")
    with pytest.raises(ValueError, match=r"search\.yaml is not valid YAML: .*line 1"):
        read_file(path)
    path.write_text("- just\n- a list\n")
    with pytest.raises(ValueError, match=r"search\.yaml must hold a mapping"):
        read_file(path)
    path.write_bytes(b"study: \xff\xfe")
    with pytest.raises(ValueError, match=r"search\.yaml cannot be read: not UTF-8"):
        read_file(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_file(tmp_path)
    path.write_text("# nothing but a comment\n")
    assert read_file(path) == {}


def test_assignments_are_read_as_yaml() -> None:
    given = assign({}, ["target.width=2048", "space.mixers=[full, kda]", "latency_cache=null", "data=a=b"])
    assert given == {
        "target": {"width": 2048},
        "space": {"mixers": ["full", "kda"]},
        "latency_cache": None,
        "data": "a=b",
    }


@pytest.mark.parametrize(
    "text", ["target.width", "=3", "target..width=3", ".=1", "space.mixers=[full", "a=@b"]
)
def test_an_assignment_that_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is not understood") as caught:
        assign({}, [text])
    assert repr(text) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_an_assignment_sets_one_key_and_leaves_its_neighbours() -> None:
    config = resolve(assign({}, ["tasks.mqar.steps=7", "tasks.mqar.batch=3"]))
    assert (config.tasks["mqar"].steps, config.tasks["mqar"].batch) == (7, 3)
    assert config.tasks["bytes"] == Config().tasks["bytes"]
    file = {"tasks": {"bytes": {"steps": 5, "batch": 9}}}
    config = resolve(assign(file, ["tasks.bytes.batch=2"]))
    assert list(config.tasks) == ["bytes"]
    assert (config.tasks["bytes"].steps, config.tasks["bytes"].batch) == (5, 2)
    texts = ["space.settings.window.size=[256]", "space.mixers=[full, window]"]
    settings = resolve(assign({}, texts)).space.settings
    assert settings["window"] == {"size": (256,)}
    assert settings["full"] == Config().space.settings["full"]


def test_tables_of_a_file_replace_the_defaults_whole() -> None:
    assert list(resolve({"tasks": {"mqar": {}}}).tasks) == ["mqar"]
    assert merge({"tasks": {"mqar": {}}}, {"tasks": {"bytes": {}}}) == {"tasks": {"bytes": {}}}
    assert merge({"target": {"width": 1, "depth": 2}}, {"target": {"width": 3}}) == {
        "target": {"width": 3, "depth": 2}
    }


def test_flags_stand_above_assignments_above_the_file_above_defaults(tmp_path: Path) -> None:
    path = tmp_path / "search.yaml"
    path.write_text("trials: 11\nseed: 11\nworkers: 11\n")
    given = given_layers(path, ["seed=12", "workers=12"], {"workers": 13, "study": None})
    config = resolve(given)
    assert (config.trials, config.seed, config.workers) == (11, 12, 13)
    assert config.study == Config().study


def test_meaning_leaves_out_where_and_how_long_a_study_runs() -> None:
    one = meaning(resolve({"trials": 5, "workers": 1, "storage": "sqlite:///a.db", "study": "a"}))
    two = meaning(resolve({"trials": 50, "workers": 8, "storage": "sqlite:///b.db", "study": "b"}))
    assert one == two
    assert hash_of(one) == hash_of(dict(reversed(two.items())))
    changed = meaning(resolve({"proxy": {"width": 96}}))
    assert hash_of(changed) != hash_of(one)
    assert {"seed", "sampler", "data", "target", "proxy", "space", "tasks", "objectives"} <= set(one)


def test_differences_show_every_leaf_that_changed() -> None:
    old = {"proxy": {"width": 64, "length": 48}, "seed": 0, "gone": 1}
    new = {"proxy": {"width": 96, "length": 48}, "seed": 0, "tasks": ["mqar"]}
    assert differences(old, new) == [
        "gone: 1, now absent",
        "proxy.width: 64, now 96",
        'tasks: absent, now ["mqar"]',
    ]
    assert differences(old, old) == []


def test_a_stored_meaning_resolves_to_itself(tiny: Callable[..., dict[str, Any]]) -> None:
    for config in (resolve(tiny()), resolve()):
        assert meaning(resolve(meaning(config))) == meaning(config)


@pytest.mark.parametrize(
    ("rungs", "said"),
    [
        ({"shares": [0.5, 0.2]}, "the shares must rise"),
        ({"shares": [0.3, 0.3]}, "the shares must rise"),
        ({"shares": [0.3, 1.0]}, "rungs.shares.1 = 1.0"),
        ({"shares": [0]}, "rungs.shares.0 = 0"),
        ({"keep": 0}, "rungs.keep = 0"),
        ({"chance": 0.05}, "rungs.chance = 0.05"),
        ({"chanse": 0.2}, "unknown key rungs.chanse; did you mean chance"),
    ],
)
def test_rungs_that_cannot_be_are_refused(rungs: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        resolve({"rungs": rungs})
