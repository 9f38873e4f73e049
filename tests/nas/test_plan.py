"""Plans: the space under its constraints, what is tried first, and when two trials are the same evaluation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nas.config import resolve
from nas.plan import Plan, make_plan
from search_space.vocabulary import VOCABULARY, read
from search_space.vocabulary import check as check_layout


@pytest.fixture
def plan_of(tiny: Callable[..., dict[str, Any]]) -> Callable[..., Plan]:
    def make(changes: dict[str, Any] | None = None) -> Plan:
        return make_plan(resolve(tiny(changes)))

    return make


def test_the_uniform_layouts_and_the_presets_that_fit_come_first(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of({"space": {"layers": 4, "mixers": list(VOCABULARY), "settings": {}}})
    uniform = [str(start.layout) for start in plan.starts if start.origin == "uniform"]
    assert uniform == [f"4*{name}" for name in VOCABULARY]
    presets = {start.origin: start.layout for start in plan.starts if start.origin != "uniform"}
    assert {"kimi-linear", "mistral", "mamba-2", "nemotron-h"} <= set(presets)
    kimi = [layer.branches[0].mixer for layer in presets["kimi-linear"].layers]
    assert kimi == ["kda", "kda", "kda", "mla"]
    for start in plan.starts:
        assert len(start.layout) == 4
        check_layout(start.layout, plan.target)
    assert len({start.layout for start in plan.starts}) == len(plan.starts)


def test_the_first_presets_mix_most_and_are_tried_among_the_samplers_layouts(
    plan_of: Callable[..., Plan],
) -> None:
    space = {"layers": 4, "mixers": ["full", "window", "linear", "mamba2", "kda", "mla"], "settings": {}}
    starts = plan_of({"space": space}).starts
    origins = [start.origin for start in starts]
    assert origins[:6] == ["uniform"] * 6 and len(origins) > 11
    # Each of the first brings two mixers together that none before it did; those of one mixer come last.
    assert {"kimi-linear", "nemotron-h"} < set(origins[6:10])
    assert origins.index("mistral") > 9 and origins.index("mamba-2") > 9
    assert all(starts[0].due(number) for number in range(30))
    assert [number for number in range(30) if starts[6].due(number)] == [0, 5, 10, 15, 20, 25]


def test_presets_with_mixers_that_are_not_allowed_or_of_another_period_stay_out(
    plan_of: Callable[..., Plan],
) -> None:
    three = plan_of({"space": {"layers": 3, "mixers": list(VOCABULARY), "settings": {}}})
    assert not {"kimi-linear", "nemotron-h"} & {start.origin for start in three.starts}
    no_latent = plan_of({"space": {"layers": 4, "mixers": ["kda", "full"], "settings": {}}})
    assert not {"kimi-linear", "mamba-2", "mistral"} & {start.origin for start in no_latent.starts}


def test_presets_with_mixers_side_by_side_need_a_space_that_has_them_so(plan_of: Callable[..., Plan]) -> None:
    alone = plan_of({"space": {"layers": 4, "mixers": ["full", "mamba2"], "settings": {}}})
    beside = plan_of({"space": {"layers": 4, "mixers": ["mamba2|full&sum"], "settings": {}}})
    assert "falcon-h1-1.5b" not in {start.origin for start in alone.starts}
    assert {start.origin for start in beside.starts} == {"uniform", "falcon-h1-1.5b"}


def test_starts_keep_the_constraints(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of({"space": {"constraints": ["full>=1", "window<=0"]}})
    assert "2*full" in [str(start.layout) for start in plan.starts]
    for start in plan.starts:
        mixers = [layer.branches[0].mixer for layer in start.layout.layers]
        assert "full" in mixers and "window" not in mixers
    free = plan_of()
    assert plan.size.count < free.size.count
    letters = len(plan.space.alphabet)
    assert free.size.count == letters**2
    owners = [plan.space.entries[index].name for index, _, _ in plan.space.alphabet.values()]
    fulls, kdas = owners.count("full"), owners.count("kda")
    assert plan.size.count == (fulls + kdas) ** 2 - kdas**2


def test_a_cost_bound_keeps_dear_layouts_out(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of({"space": {"constraints": ["kv_bytes<=14KiB"]}})
    free = plan_of()
    assert 0 < plan.size.count < free.size.count
    assert plan.space.why_not(read("2*full")) is not None
    for start in plan.starts:
        assert plan.space.why_not(start.layout) is None


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"mixers": []}, "the space is empty"),
        ({"mixers": ["ful"], "settings": {}}, "did you mean full"),
        ({"constraints": ["full>=1", "full<=0"]}, "the space is empty.*full>=1, full<=0.*loosen"),
        ({"constraints": ["kv_bytes<=1"]}, "comes below 8KiB.*loosen"),
        ({"settings": {"mamba2": {"state": [16]}}}, "settings are given for 'mamba2'"),
        ({"settings": {"full": {"kv_head": [1]}}}, "did you mean kv_heads"),
        ({"settings": {"window": {"size": [6]}}}, "size=6 is not valid"),
        ({"channels": ["swigl"]}, "did you mean swiglu"),
    ],
)
def test_an_empty_or_misspelt_space_is_refused(
    plan_of: Callable[..., Plan], space: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of({"space": space})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {"mqarr": {}}}, "no task 'mqarr'; did you mean mqar"),
        ({"proxy": {"length": 3}}, "length 3 is too short for . pairs: use at least"),
        ({"proxy": {"width": 20}}, "width 20 is not valid"),
        ({"proxy": {"device": "tpu9"}}, "device 'tpu9' cannot be used here"),
        ({"target": {"device": "meta"}}, "device 'meta' cannot be used here"),
    ],
)
def test_what_cannot_be_trained_or_measured_is_refused_before_anything_is(
    plan_of: Callable[..., Plan], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(changes)


def test_text_must_be_long_enough_for_its_sequences_in_both_parts(
    plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    path = tmp_path / "book.txt"
    path.write_text("so it goes. " * 400)  # 4,800 bytes, 480 of them held out
    text = {"tasks": {"bytes": {"steps": 1, "batch": 2}}, "data": str(path)}
    assert plan_of(text | {"proxy": {"length": 400}}).data["sha256"]
    with pytest.raises(ValueError, match="480 bytes in a split, too few for sequences of 512"):
        plan_of(text | {"proxy": {"length": 512}})


def test_scaled_positions_reach_both_frames(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of({"target": {"rotary_scaling": "yarn", "rotary_factor": 4, "rotary_length": 2048}})
    for frame in (plan.target, plan.proxy, plan.job(read("full")).frame):
        assert (frame.rotary_scaling, frame.rotary_factor, frame.rotary_length) == ("yarn", 4.0, 2048)


def test_the_evaluation_key_changes_with_everything_that_training_sees(
    plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    layout = read("full kda")
    plan = plan_of()
    key = plan.evaluation_key(layout)
    assert key == plan_of({"trials": 99, "target": {"batch": 4}, "sampler": "tpe"}).evaluation_key(layout)
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("a" * 9000)
    two.write_text("b" * 9000)
    text = {"mqar": {"steps": 2, "batch": 4, "learning_rates": [0.01]}, "bytes": {"steps": 1}}
    task = {"steps": 2, "batch": 4, "learning_rates": [0.01]}
    keys = [key, plan.evaluation_key(read("kda full"))] + [
        plan_of(changes).evaluation_key(layout)
        for changes in (
            {"seed": 1},
            {"proxy": {"width": 24}},
            {"proxy": {"length": 20}},
            {"target": {"rotary_base": 5e5}},
            {"target": {"rotary_scaling": "linear", "rotary_factor": 2}},
            {"target": {"rotary_scaling": "linear", "rotary_factor": 4}},
            {"target": {"rotary_scaling": "yarn", "rotary_factor": 4, "rotary_length": 2048}},
            {"target": {"rotary_scaling": "yarn", "rotary_factor": 4, "rotary_length": 4096}},
            {"proxy": {"stem_taps": 0}},
            {"proxy": {"weight_decay": 0.2}},
            {"proxy": {"precision": "bfloat16"}},
            {"tasks": {"mqar": {**task, "steps": 3}}},
            {"tasks": {"mqar": {**task, "batch": 8}}},
            {"tasks": {"mqar": {**task, "learning_rates": [0.02]}}},
            {"tasks": {"mqar": {**task, "pairs": [2, 3]}}},
            {"tasks": text, "data": str(one)},
            {"tasks": text, "data": str(two)},
        )
    ]
    assert len(set(keys)) == len(keys)


def test_pairs_that_do_not_fit_the_length_are_refused(plan_of: Callable[..., Plan]) -> None:
    with pytest.raises(
        ValueError, match=r"tasks\.mqar\.pairs: 9 pairs do not fit a length of 20: raise .* to 36"
    ):
        plan_of({"proxy": {"length": 20}, "tasks": {"mqar": {"pairs": [2, 9]}}})
    with pytest.raises(ValueError, match="only mqar"):
        plan_of({"tasks": {"bytes": {"pairs": [2]}}})
