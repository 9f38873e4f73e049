"""What `nas explain` says, on studies whose truth is known, and that it says nothing where there is nothing to say."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dashboards.reasons import FRONT, Importance, Reasons
from nas.explain.answers import Answers, encoding_of
from nas.explain.effects import effects, rank_correlation
from nas.explain.importance import importance
from nas.explain.reasons import reasons, reasons_json
from nas.explain.shares import lowest, tail
from nas.explain.studied import studied
from nas.front import hypervolume
from storage.records import Axis, LayoutRecord, ResultRecord, StudyRecord, TrialRecord

COSTS = {"full": (3.0, 1000), "window": (2.0, 300), "kda": (1.5, 20), "mamba2": (1.0, 10)}
FAMILIES = {"full": "attention", "window": "sparse", "kda": "delta", "mamba2": "state_space"}
AXES = (
    Axis(name="quality", maximise=True, low=0.0, high=1.0, log=False),
    Axis(name="latency_ms", maximise=False, low=1.0, high=64.0, log=True, unit="ms"),
    Axis(name="kv_bytes", maximise=False, low=1.0, high=2.0**20, log=True, unit="bytes"),
)
STUDY = StudyRecord(id=1, name="s", config={}, config_hash="x", axes=AXES, families=FAMILIES, created_at=0.0)
Quality = Callable[[Sequence[str]], float]


def trial(
    number: int, mixers: Sequence[str], quality: float, params: dict[str, Any] | None = None, **more: Any
) -> TrialRecord:
    """A trained layout of one mixer a layer."""
    result = ResultRecord(
        rung=0, quality=quality, scores={"mqar": 1 - quality}, details={}, steps=1, tokens=1, train_s=1.0,
        worker_s=1.0, seed=0,
    )  # fmt: skip
    layers = tuple(
        {
            "branches": [{"mixer": name, "settings": {}} for name in mixer.split("|")],
            "channel": {"mixer": "swiglu", "settings": {}},
        }
        for mixer in mixers
    )
    record = TrialRecord(
        number=number, state="done", origin="search", sampler_attrs={}, layer_costs=(), evaluation_key="", attempts=1,
        why="", results=(result,), ended_at=float(number),
        layout=LayoutRecord(key=f"{number}", text=" ".join(mixers), layers=layers),
        params={f"{p}.mixer": mixer for p, mixer in enumerate(mixers)} if params is None else params,
        costs={
            "latency_ms": sum(COSTS[m.split("|")[0]][0] for m in mixers),
            "kv_bytes": float(sum(COSTS[m.split("|")[0]][1] for m in mixers)),
            "params": 1.0,
        },
    )  # fmt: skip
    return replace(record, **more)


def drawn(
    count: int, quality: Quality, *, noise: float = 0.02, seed: int = 0, sharing: str = "layer"
) -> list[TrialRecord]:
    """Random layouts of four layers, with sizes for the windows and the full ones."""
    rng, made = random.Random(seed), {}
    while len(made) < count:
        mixers = tuple(rng.choice(list(COSTS)) for _ in range(4))
        sizes = {"window": rng.choice((8, 16)), "full": rng.choice((1, 2))}
        params: dict[str, Any] = {}
        for position, mixer in enumerate(mixers):
            params[f"{position}.mixer"] = mixer
            if mixer in sizes and sharing == "layer":
                params[f"{position}.{mixer}.size"] = rng.choice((8, 16)) if mixer == "window" else 1
            elif mixer in sizes:
                params[f"{mixer}.size"] = sizes[mixer]
        key = json.dumps(params)
        if key not in made:
            made[key] = trial(len(made), mixers, quality(mixers) + rng.gauss(0, noise), params)
    return list(made.values())


def step(mixers: Sequence[str]) -> float:
    return 0.9 if mixers[2] == "full" else 0.3


def of(trials: Sequence[TrialRecord], objective: str | None = None) -> Reasons:
    found = reasons(STUDY, trials, objective)
    assert found is not None
    return found


def weigh(trials: Sequence[TrialRecord], objective: str = "quality") -> Importance:
    return importance(studied(STUDY, trials), objective)


@pytest.mark.parametrize("sharing", ["layer", "study"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_one_layer_that_decides_everything_is_found(sharing: str, seed: int) -> None:
    found = of(drawn(64, step, seed=seed, sharing=sharing))
    first = found.importance[0]
    assert first.objective == "quality" and first.positions.weights[0].name == "2"
    assert first.positions.weights[0].share > first.positions.by_chance
    assert first.parameters.weights[0].name == "2.mixer"
    assert found.said[0].startswith("Layer 3 matters most: full there is worth +.5") or found.said[
        0
    ].startswith("Layer 3 matters most: full there is worth +.6")
    for cell in found.effects.cells:
        if cell.mixer == "full" and cell.position == 2:
            assert cell.sure and cell.low > 0.3
        elif cell.position != 2:
            assert abs(cell.change) < 0.06
    worth = [swap for swap in found.effects.swaps if swap.position == 2]
    assert {swap.mixer for swap in worth} == {"full"} and len(worth) == 3
    assert all(swap.low <= 0.6 <= swap.high for swap in worth)


def test_importance_is_of_what_is_best_and_not_of_what_is_worst() -> None:
    """The first layer decides what is worst, the third one what is best."""

    def two(mixers: Sequence[str]) -> float:
        return 0.9 if mixers[2] == "full" else 0.1 if mixers[0] == "kda" else 0.5

    trials = drawn(96, two, seed=1)
    assert weigh(trials).positions.weights[0].name == "2"
    upside_down = replace(STUDY, axes=(replace(AXES[0], maximise=False), *AXES[1:]))
    assert importance(studied(upside_down, trials), "quality").positions.weights[0].name == "0"
    assert weigh(trials, "mqar").positions.weights[0].name == "0", "the score is one minus the quality"


def test_importance_near_the_front_is_of_the_near_side() -> None:
    """All cost the same, so that the front is the best quality: the third layer decides it, the first what is worst."""

    def two(mixers: Sequence[str]) -> float:
        return 0.9 if mixers[2] == "full" else 0.1 if mixers[0] == "kda" else 0.5

    same = {"latency_ms": 2.0, "kv_bytes": 9.0, "params": 1.0}
    trials = [replace(own, costs=same) for own in drawn(96, two, seed=1)]
    assert weigh(trials, FRONT).positions.weights[0].name == "2"


def test_shares_of_importance_add_up_and_sums_are_of_their_parts() -> None:
    found = weigh(drawn(48, step, sharing="study"))
    for ranking in (found.parameters, found.positions, found.kinds, found.mixers):
        assert sum(weight.share for weight in ranking.weights) == pytest.approx(1.0)
        shares = [weight.share for weight in ranking.weights]
        assert shares == sorted(shares, reverse=True)
    alone = {weight.name: weight.share for weight in found.parameters.weights}
    sums = {weight.name: weight.share for weight in found.positions.weights}
    kinds = {weight.name: weight.share for weight in found.kinds.weights}
    assert sums["2"] == pytest.approx(alone["2.mixer"])
    assert sums["all"] == pytest.approx(alone["window.size"] + alone["full.size"])
    assert kinds["which mixer"] == pytest.approx(sum(alone[f"{p}.mixer"] for p in range(4)))
    assert kinds["settings of window"] == pytest.approx(alone["window.size"])


def test_what_cannot_be_weighed_is_named() -> None:
    found = weigh(drawn(24, step))
    assert any("has one answer only" in line for line in found.left_out)
    asked = {weight.name for weight in found.parameters.weights}
    assert asked and not any(line.split(":")[0] in asked for line in found.left_out)
    everything = {question for own in drawn(24, step) for question in own.params}
    assert asked | {line.split(":")[0] for line in found.left_out} == everything


def test_importance_near_the_front_is_of_the_front() -> None:
    """Quality is noise here, so that costs alone make the front, and full costs most everywhere."""
    found = weigh(drawn(64, lambda _: 0.5, noise=1e-6), FRONT)
    assert {weight.name for weight in found.mixers.weights} == set(COSTS)
    assert found.mixers.weights[0].share > found.mixers.by_chance


def test_partial_effects_of_an_additive_truth_lie_in_their_intervals() -> None:
    hits = swaps = count = swap_count = 0
    widths = []
    for seed in range(6):
        rng = random.Random(100 + seed)
        worth = {(p, m): rng.uniform(-0.12, 0.12) for p in range(4) for m in COSTS}

        def additive(mixers: Sequence[str], worth: dict[tuple[int, str], float] = worth) -> float:
            return 0.5 + sum(worth[p, m] for p, m in enumerate(mixers))

        known = studied(STUDY, drawn(40, additive, seed=seed))
        found = effects(known, "quality")
        layouts = [own.layout.text.split() for own in known.trials]
        fronts = [own for own, rank in zip(layouts, known.ranks, strict=True) if rank == 0]
        assert found.layouts == 40 and found.front_layouts == len(fronts)
        for cells, over in ((found.cells, layouts), (found.front_cells, fronts)):
            assert len(cells) == 16
            for cell in cells:
                was = np.mean([worth[cell.position, own[cell.position]] for own in over])
                hits += cell.low <= worth[cell.position, cell.mixer] - was <= cell.high
                count += 1
                widths.append(cell.high - cell.low)
        for swap in found.swaps:
            truth = worth[swap.position, swap.mixer] - worth[swap.position, swap.against]
            swaps += swap.low <= truth <= swap.high
            swap_count += 1
    assert hits / count > 0.9 and swaps / swap_count > 0.88
    # Intervals that hold everything would say nothing.
    assert np.mean(widths) < 0.15


def test_intervals_of_few_trials_are_not_too_narrow() -> None:
    """Of sixteen trials the process knows little, and its weights are a guess."""
    hits = count = 0
    for seed in range(12):
        rng = random.Random(200 + seed)
        worth = {(p, m): rng.uniform(-0.15, 0.15) for p in range(4) for m in COSTS}

        def additive(mixers: Sequence[str], worth: dict[tuple[int, str], float] = worth) -> float:
            return 0.5 + sum(worth[p, m] for p, m in enumerate(mixers))

        for swap in effects(studied(STUDY, drawn(16, additive, seed=seed)), "quality").swaps:
            truth = worth[swap.position, swap.mixer] - worth[swap.position, swap.against]
            hits += swap.low <= truth <= swap.high
            count += 1
    assert count > 80 and hits / count > 0.9


def test_an_additive_truth_has_no_pairs() -> None:
    rng = random.Random(1)
    worth = {(p, m): rng.uniform(-0.12, 0.12) for p in range(4) for m in COSTS}

    def additive(mixers: Sequence[str]) -> float:
        return 0.5 + sum(worth[p, m] for p, m in enumerate(mixers))

    pairs = [
        pair
        for seed in range(3)
        for pair in effects(studied(STUDY, drawn(60, additive, seed=seed)), "quality").pairs
    ]
    assert len(pairs) > 30
    assert sum(pair.low <= 0 <= pair.high for pair in pairs) / len(pairs) > 0.9
    assert max(abs(pair.change) for pair in pairs) < 0.06


def test_a_pair_that_is_more_than_its_two_is_found() -> None:
    def paired(mixers: Sequence[str]) -> float:
        return 0.3 + 0.2 * sum(a == "kda" and b == "full" for a, b in pairwise(mixers))

    found = effects(studied(STUDY, drawn(120, paired)), "quality")
    assert (found.pairs[0].first, found.pairs[0].second) == ("kda", "full")
    assert found.pairs[0].low > 0.03
    seen = sum(
        a == "kda" and b == "full" for own in drawn(120, paired) for a, b in pairwise(own.layout.text.split())
    )
    assert found.pairs[0].seen == seen


@pytest.mark.parametrize("seed", range(4))
def test_noise_is_not_explained(seed: int) -> None:
    found = of(drawn(40, lambda _: 0.5, noise=0.1, seed=seed))
    trust = found.effects.trust
    assert trust is not None
    if not trust.enough:
        assert any("not to be relied on" in line for line in found.said)
        assert not any("is worth" in line for line in found.said)
    # Once in 20 it may look as if there were something; then it must look small.
    assert trust.rank_correlation < 0.45


def test_few_trials_are_too_early() -> None:
    found = of(drawn(11, step))
    assert all("too early" in item.why_not and not item.positions.weights for item in found.importance)
    assert "too early" in found.effects.why_not and found.effects.cells == () and found.effects.swaps == ()
    assert len(found.shares) > 0 and len(found.progress) == 11
    assert "11 trained layouts of the space, and 12 are needed" in found.said[0]
    assert of(drawn(12, step)).effects.why_not == ""


def test_a_constant_objective_is_said() -> None:
    found = of(drawn(30, lambda _: 0.5, noise=0.0))
    assert found.importance[0].why_not and not found.importance[0].parameters.weights
    assert found.effects.why_not == "every trial has the same quality, 0.5"
    assert not found.importance[1].why_not, "costs still differ"


def test_equal_trials_have_nothing_to_explain() -> None:
    same = [trial(number, ("kda", "full", "kda", "full"), 0.5) for number in range(20)]
    found = of(same)
    assert all(item.why_not for item in found.importance)
    assert found.effects.why_not and found.on_front == 20
    assert [(item.mixer, item.front, item.rest, item.chance) for item in found.shares] == [
        (mixer, 20, 0, 1.0) for mixer in ("kda", "full", "kda", "full")
    ]


def test_one_mixer_everywhere_has_no_alternative() -> None:
    same = [trial(number, ("kda",) * 4, 0.3 + number / 50) for number in range(14)]
    assert "all layers of all trials hold kda" in of(same).effects.why_not


def test_only_what_was_trained_to_the_end_counts() -> None:
    done = drawn(20, step)
    cut = replace(trial(98, ("full", "full", "full", "full"), 0.99), state="pruned")
    lost = replace(trial(99, ("full", "full", "full", "full"), 0.99), state="lost", results=())
    assert of([*done, cut, lost]) == of(done)
    assert reasons(STUDY, [cut, lost]) is None and reasons(STUDY, []) is None


def test_presets_from_outside_of_the_space_count_for_shares_and_ratios_alone() -> None:
    done = drawn(20, step)
    preset = trial(20, ("mamba2|full", "kda", "kda", "mamba2"), 0.8, {})
    without, found = of(done), of([*done, preset])
    assert (found.trials, found.inside) == (21, 20)
    assert found.effects.trials == without.effects.trials == 20
    assert found.importance[0].trials == 20
    assert any(item.mixer == "mamba2|full" and item.front + item.rest == 1 for item in found.shares)
    assert any(row.best_trial == 20 for row in found.ratios)


def test_shares_and_ratios_by_hand() -> None:
    """Two of five are on the front: the best in quality, and the cheapest."""
    five = [
        trial(0, ("full", "kda", "kda", "kda"), 0.9),
        trial(1, ("full", "full", "kda", "kda"), 0.6),
        trial(2, ("full", "kda", "kda", "window"), 0.5),
        trial(3, ("mamba2", "mamba2", "mamba2", "mamba2"), 0.2),
        trial(4, ("full", "kda|window", "kda", "full"), 0.7),
    ]
    found = of(five)
    assert found.on_front == 2
    first = {item.mixer: item for item in found.shares if item.position == 0}
    assert (first["full"].front, first["full"].front_of) == (1, 2)
    assert (first["full"].rest, first["full"].rest_of) == (3, 3)
    # Of five with four full ones, two drawn by lot hold no more than one of them in 4 of 10 draws.
    assert first["full"].chance == pytest.approx(0.4)
    assert first["mamba2"].chance == pytest.approx(0.4)
    second = {item.mixer for item in found.shares if item.position == 1}
    assert second == {"kda", "full", "mamba2", "kda|window"}
    kda = {row.layers: row for row in found.ratios if row.name == "kda" and not row.family}
    assert set(kda) == {0, 2, 3}
    assert [kda[n].ratio for n in (0, 2, 3)] == ["1:0", "1:1", "1:3"]
    assert (kda[2].trials, kda[2].best_trial, kda[2].best_layout) == (3, 4, "full kda|window kda full")
    assert kda[2].mean == pytest.approx((0.6 + 0.5 + 0.7) / 3) and kda[2].best == 0.7
    assert kda[2].deviation == pytest.approx(0.1) and kda[3].deviation is None
    full = {row.layers: row for row in found.ratios if row.name == "full" and not row.family}
    assert (
        full[1].ratio == "3:1" and full[1].best_trial == 0 and full[1].trials == 2 and full[1].on_front == 1
    )
    sparse = {row.layers: row.trials for row in found.ratios if row.name == "sparse" and row.family}
    assert sparse == {0: 3, 1: 2}
    for name, family in {(row.name, row.family) for row in found.ratios}:
        own = [row for row in found.ratios if (row.name, row.family) == (name, family)]
        assert sum(row.trials for row in own) == 5


def test_the_hypervolume_grows_in_the_order_of_ending() -> None:
    done = drawn(20, step)
    shuffled = [replace(own, ended_at=float(-own.number)) for own in done]
    found = of(shuffled)
    assert [item.number for item in found.progress] == list(range(19, -1, -1))
    for item in found.progress:
        ended = [own for own in shuffled if own.number >= item.number]
        assert item.hypervolume == pytest.approx(hypervolume(ended, AXES))


def test_a_score_of_a_task_can_be_explained() -> None:
    found = of(drawn(40, step), "mqar")
    assert found.objective == "mqar" and [item.objective for item in found.importance] == [
        "mqar",
        FRONT,
        "quality",
    ]
    best = max((cell for cell in found.effects.cells if cell.position == 2), key=lambda cell: -cell.change)
    assert best.mixer == "full", "the score is one minus the quality"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("latency_ms", "counted, not learnt"),
        ("params", "counted, not learnt"),
        ("qualiti", "did you mean quality"),
    ],
)
def test_what_cannot_be_explained_is_refused(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        reasons(STUDY, drawn(3, step), name)


def test_a_smaller_objective_is_explained_the_other_way_round() -> None:
    loss = (replace(AXES[0], maximise=False), *AXES[1:])
    found = reasons(replace(STUDY, axes=loss), drawn(48, step))
    assert found is not None and not found.maximise
    worth = [swap for swap in found.effects.swaps if swap.position == 2 and swap.against == "full"]
    assert worth and worth[0].high < -0.4, "what is best there takes from the loss"
    kda = [row for row in found.ratios if row.name == "full" and row.layers == 1]
    assert kda[0].best < kda[0].mean


def test_it_is_plain_json_and_the_same_again() -> None:
    found = of(drawn(24, step))
    text = json.dumps(reasons_json(found), allow_nan=False)
    assert json.loads(text)["said"] == list(found.said)
    assert of(drawn(24, step)) == found


def test_a_changed_mixer_brings_settings_and_takes_its_own_away() -> None:
    answers = Answers(
        [
            {"0.mixer": "window", "0.window.size": 8, "0.channel": "swiglu", "1.mixer": "kda", "1.channel": "moe"},
            {"0.mixer": "full", "1.mixer": "window", "1.window.size": 16, "1.channel": "swiglu"},
        ]
    )  # fmt: skip
    first, second = answers.params
    assert answers.put(first, 0, "full", 0) == {"0.mixer": "full", "1.mixer": "kda", "1.channel": "moe"}
    assert answers.put(first, 1, "window", 5) == {**first, "1.mixer": "window", "1.window.size": 16}
    assert answers.put(second, 0, "window", 0) == {
        **second,
        "0.mixer": "window",
        "0.window.size": 8,
        "0.channel": "swiglu",
    }
    # Nobody holds kda in the first position: it comes from the second.
    assert answers.put(second, 0, "kda", 0)["0.channel"] == "moe"
    assert answers.put(first, 0, "window", 3) == first
    shared = Answers(
        [
            {"0.mixer": "window", "1.mixer": "window", "window.size": 8},
            {"0.mixer": "full", "1.mixer": "kda", "full.size": 2},
        ]
    )
    one, other = shared.params
    assert shared.put(one, 0, "full", 0) == {
        "0.mixer": "full", "1.mixer": "window", "window.size": 8, "full.size": 2
    }  # fmt: skip
    # What all layers share stays as the layout has it, whatever the lender holds.
    wide = {"0.mixer": "kda", "1.mixer": "window", "window.size": 16}
    lender = Answers([{"0.mixer": "window", "1.mixer": "kda", "window.size": 8}, wide])
    assert lender.put(wide, 0, "window", 0) == {"0.mixer": "window", "1.mixer": "window", "window.size": 16}
    assert shared.put(other, 0, "window", 0) == {"0.mixer": "window", "1.mixer": "kda", "window.size": 8}


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), position=st.integers(0, 3), sharing=st.sampled_from(["layer", "study"]))
def test_a_changed_layout_answers_exactly_what_its_mixers_ask(seed: int, position: int, sharing: str) -> None:
    answers = Answers([own.params for own in drawn(12, step, seed=seed, sharing=sharing)])
    encoding = encoding_of(answers.params)
    for turn, own in enumerate(answers.params):
        for mixer in answers.mixers:
            changed = answers.put(own, position, mixer, turn)
            assert encoding.takes(changed)
            assert {k: v for k, v in changed.items() if k.endswith(".mixer")} == {
                **{k: v for k, v in own.items() if k.endswith(".mixer")},
                f"{position}.mixer": mixer,
            }
            held = [(p, changed[f"{p}.mixer"]) for p in range(4)]
            wanted = {
                f"{p}.{m}.size" if sharing == "layer" else f"{m}.size"
                for p, m in held
                if m in ("window", "full")
            }
            assert {k for k in changed if k.endswith(".size")} == wanted


def test_options_are_those_of_all_positions() -> None:
    encoding = encoding_of(
        [
            {"0.mixer": "kda", "1.mixer": "full", "1.full.size": 10},
            {"0.mixer": "full", "0.full.size": 9, "1.mixer": "full", "1.full.size": 9},
        ]
    )
    assert {name: own.choices for name, own in encoding.distributions.items()} == {  # type: ignore[attr-defined]
        "0.mixer": ("full", "kda"),
        "0.full.size": (9, 10),
        "1.mixer": ("full", "kda"),
        "1.full.size": (9, 10),
    }


@settings(deadline=None)
@given(st.integers(1, 12), st.data())
def test_the_tail_is_counted_out(whole: int, data: st.DataObject) -> None:
    marked, drawn_ = data.draw(st.integers(0, whole)), data.draw(st.integers(0, whole))
    hits = data.draw(st.integers(max(0, drawn_ + marked - whole), min(marked, drawn_)))
    draws = [sum(i < marked for i in chosen) for chosen in combinations(range(whole), drawn_)]
    below, above = (sum(t <= hits for t in draws), sum(t >= hits for t in draws))
    assert tail(hits, drawn_, marked, whole) == pytest.approx(min(below, above) / len(draws))


def test_ratios_are_in_lowest_terms() -> None:
    assert [lowest(6, 2), lowest(3, 1), lowest(0, 4), lowest(4, 0), lowest(5, 3)] == [
        "3:1", "3:1", "0:1", "1:0", "5:3",
    ]  # fmt: skip


def test_rank_correlation_is_spearmans() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for _ in range(5):
        one, other = rng.integers(0, 6, 20).astype(float), rng.integers(0, 6, 20).astype(float)
        assert rank_correlation(one, other) == pytest.approx(scipy_stats.spearmanr(one, other).statistic)
    assert rank_correlation(np.ones(5), np.arange(5.0)) == 0.0
