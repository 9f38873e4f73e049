"""The space of patterns against plain enumeration: its size, its samples, its neighbours, its questions."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import pytest

from search_space.constraint import Bound, Count, Place, read_constraint, read_constraints
from search_space.cost import at_depth, layout_cost
from search_space.entries import make_channels, make_entries
from search_space.frame import Frame
from search_space.layout import Branch, Layer, Layout
from search_space.setting import Value
from search_space.space import RandomChooser, Space
from search_space.vocabulary import VOCABULARY, plain, read

T = TypeVar("T")
FRAME = Frame(width=512, train_length=1024, context=2048)


def space_of(
    names: Sequence[str],
    layers: int = 3,
    *,
    settings: Mapping[str, Mapping[str, Sequence[Value]]] | None = None,
    channels: Sequence[str] = (),
    sharing: Any = "layer",
    constraints: Sequence[str] = (),
    frame: Frame = FRAME,
    fill: str = "stack",
) -> Space:
    return Space(
        layers=layers,
        entries=make_entries(names, settings or {}, frame),
        channels=make_channels(channels),
        sharing=sharing,
        constraints=read_constraints(constraints),
        frame=frame,
        fill=fill,
    )


@dataclass(frozen=True)
class Piece:
    """One layer that may stand somewhere: which entry and values it came from, and its channel."""

    layer: Layer
    entry: str
    values: tuple[Value, ...]
    channel: str


def pieces(
    names: Sequence[str],
    settings: Mapping[str, Mapping[str, Sequence[Value]]],
    channels: Sequence[str],
    frame: Frame,
) -> list[Piece]:
    made = []
    for name in names:
        free = settings.get(name, {})
        for values in itertools.product(*free.values()):
            inside = ",".join(f"{key}={value}" for key, value in zip(free, values, strict=True))
            for channel in channels or ("swiglu",):
                text = f"{name}[{inside}]" if inside else name
                layer = plain(read(text if "/" in name else f"{text}/{channel}"), frame).layers[0]
                piece = Piece(layer, name, values, str(layer.channel))
                if piece not in made:
                    made.append(piece)
    return made


def enumerate_patterns(
    made: Sequence[Piece], layers: int, study: bool, keep: Callable[[Layout], bool]
) -> dict[Layout, tuple[Piece, ...]]:
    found = {}
    for pattern in itertools.product(made, repeat=layers):
        values = {piece.entry: piece.values for piece in pattern}
        if study and any(values[piece.entry] != piece.values for piece in pattern):
            continue
        layout = Layout(tuple(piece.layer for piece in pattern))
        if keep(layout):
            found[layout] = pattern
    return found


def holds(layer: Layer, *mixers: str) -> bool:
    return any(branch.mixer in mixers for branch in layer.branches)


def count(layout: Layout, *mixers: str) -> int:
    return sum(holds(layer, *mixers) for layer in layout.layers)


def price(name: str, most: float, frame: Frame = FRAME, fill: str = "stack") -> Callable[[Layout], bool]:
    def keep(layout: Layout) -> bool:
        cost = layout_cost(at_depth(layout, frame, fill), frame)
        return {"kv_bytes": cost.stored_bytes, "params": cost.params, "flops_decode": cost.flops_decode}[
            name
        ] <= most

    return keep


DEEP = replace(FRAME, depth=8)


@dataclass(frozen=True)
class Case:
    names: Sequence[str]
    keep: Callable[[Layout], bool] = lambda _: True
    settings: Mapping[str, Mapping[str, Sequence[Value]]] = field(default_factory=dict)
    channels: Sequence[str] = ()
    constraints: Sequence[str] = ()
    layers: int = 3
    frame: Frame = FRAME
    fill: str = "stack"

    def space(self, sharing: str) -> Space:
        # Settings that a search varies unless told otherwise are pinned to none here.
        settings = {
            name: {**({} if not searched(name) else {searched(name): ()}), **self.settings.get(name, {})}
            for name in self.names
            if name in VOCABULARY
        }
        return space_of(
            self.names,
            self.layers,
            settings=settings,
            channels=self.channels,
            sharing=sharing,
            constraints=self.constraints,
            frame=self.frame,
            fill=self.fill,
        )

    def brute(self, sharing: str) -> dict[Layout, tuple[Piece, ...]]:
        made = pieces(self.names, self.settings, self.channels, self.frame)
        return enumerate_patterns(made, self.layers, sharing == "study", self.keep)


def searched(name: str) -> str:
    return {
        "full": "kv_heads",
        "window": "size",
        "linear": "head_dim",
        "mamba2": "state",
        "kda": "head_dim",
        "mla": "rank",
    }[name]


KDA_SIZES: Mapping[str, Mapping[str, Sequence[Value]]] = {"kda": {"head_dim": (32, 64)}}
TWO: Mapping[str, Mapping[str, Sequence[Value]]] = {
    "kda": {"head_dim": (32, 64)},
    "full": {"kv_heads": (2, 4), "qk_norm": ("false", "true")},
}
CASES = {
    "one word": Case(["full"]),
    "two words": Case(["full", "kda"], layers=5),
    "a setting": Case(["full", "kda"], settings=KDA_SIZES, layers=4),
    "two settings": Case(["full", "window"], settings={"full": {"kv_heads": (1, 2), "rotary": (0.0, 0.5)}}),
    "two channels": Case(["full", "kda"], settings=KDA_SIZES, channels=["swiglu", "none"]),
    "one other channel": Case(["full", "kda"], channels=["none"]),
    "own channel": Case(["full/none", "kda"], channels=["swiglu", "swiglu[ratio=2]"]),
    "whole layers": Case(["window[size=512]|mamba2", "full"], layers=4),
    "at least": Case(
        ["full", "kda"], lambda x: count(x, "full") >= 2, KDA_SIZES, constraints=["full>=2"], layers=4
    ),
    "at most": Case(
        ["full", "kda"], lambda x: count(x, "full") <= 1, KDA_SIZES, constraints=["full <= 1"], layers=4
    ),
    "a family": Case(
        ["full", "mla", "kda"],
        lambda x: count(x, "mla") >= 1 and count(x, "kda") <= 1,
        constraints=["latent>=1", "delta<=1"],
    ),
    "branches belong to two families": Case(
        ["window[size=512]|mamba2", "full", "mamba2"],
        lambda x: count(x, "mamba2") >= 2 and count(x, "window") <= 1,
        constraints=["state_space>=2", "sparse<=1"],
    ),
    "not first": Case(
        ["full", "kda"], lambda x: not holds(x.layers[0], "full"), KDA_SIZES, constraints=["full not first"]
    ),
    "not last": Case(
        ["full", "kda"], lambda x: not holds(x.layers[-1], "kda"), KDA_SIZES, constraints=["delta not last"]
    ),
    "cache": Case(
        ["full", "kda"],
        price("kv_bytes", 3.5 * 2**20),
        TWO | {"full": {"kv_heads": (1, 4)}},
        constraints=["kv_bytes<=3.5MiB"],
    ),
    "parameters of a deep network": Case(
        ["full", "kda", "mla"],
        price("params", 17_000_000, DEEP),
        channels=["swiglu", "none"],
        constraints=["params<=17000000"],
        frame=DEEP,
    ),
    "stretched": Case(
        ["full", "kda"],
        price("kv_bytes", 15.5e6, DEEP, "stretch"),
        settings={"full": {"kv_heads": (1, 8)}},
        constraints=["kv_bytes<=15.5MB"],
        frame=DEEP,
        fill="stretch",
    ),
    "flops": Case(
        ["full", "kda", "window"], price("flops_decode", 3.0e7), constraints=["flops_decode<=3e7"], layers=4
    ),
    "all together": Case(
        ["full", "kda", "window[size=512]|mamba2"],
        lambda x: (
            count(x, "full") >= 1
            and count(x, "kda") >= 1
            and not holds(x.layers[0], "full")
            and not holds(x.layers[-1], "window")
            and price("kv_bytes", 6 * 2**20)(x)
        ),
        {"kda": {"head_dim": (32, 64)}, "full": {"kv_heads": (1, 8)}},
        ["swiglu", "none"],
        ["attention>=1", "kda>=1", "full not first", "window not last", "kv_bytes<=6MiB"],
    ),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
SHARING = pytest.mark.parametrize("sharing", ["layer", "study"])


@EVERY_CASE
def test_the_cases_ask_something(case: Case) -> None:
    everything = enumerate_patterns(
        pieces(case.names, case.settings, case.channels, case.frame), case.layers, False, lambda _: True
    )
    found = case.brute("layer")
    assert 0 < len(found) < 5000
    assert (len(found) < len(everything)) == bool(case.constraints)
    if any(len(options) > 1 for free in case.settings.values() for options in free.values()):
        assert len(case.brute("study")) < len(found)


@EVERY_CASE
@SHARING
def test_size_is_the_number_of_patterns(case: Case, sharing: str) -> None:
    size = case.space(sharing).size()
    assert size.exact
    assert size.count == len(case.brute(sharing))


@EVERY_CASE
@SHARING
def test_samples_are_inside(case: Case, sharing: str) -> None:
    space, brute = case.space(sharing), case.brute(sharing)
    rng = random.Random(1)
    for _ in range(60):
        layout = space.sample(rng)
        assert layout in brute
        assert space.why_not(layout) is None


@pytest.mark.parametrize("name", ["two channels", "at least", "cache", "branches belong to two families"])
@SHARING
def test_samples_reach_every_pattern(name: str, sharing: str) -> None:
    space, left, rng = CASES[name].space(sharing), set(CASES[name].brute(sharing)), random.Random(2)
    for _ in range(40 * len(left)):
        left.discard(space.sample(rng))
        if not left:
            return
    assert not left


@SHARING
def test_samples_are_found_where_hardly_any_pattern_is_valid(sharing: str) -> None:
    space = space_of(
        ["full", "kda", "mamba2", "mla"],
        12,
        sharing=sharing,
        constraints=["full>=11", "full not first"],
        settings={"kda": {"head_dim": (32, 64)}},
    )
    seen = {space.sample(random.Random(seed)) for seed in range(5)}
    assert all(count(layout, "full") == 11 and not holds(layout.layers[0], "full") for layout in seen)
    assert all(space.params_of(layout) is not None for layout in seen)
    assert len(seen) > 1


class Replay:
    """Answers from a dictionary, and remembers what was asked."""

    def __init__(self, answers: Mapping[str, Any]) -> None:
        self.answers = answers
        self.asked: set[str] = set()

    def choose(self, name: str, options: Sequence[T]) -> T:
        self.asked.add(name)
        assert self.answers[name] in options
        return self.answers[name]


@EVERY_CASE
@SHARING
def test_drawing_and_naming_the_choices_are_inverse(case: Case, sharing: str) -> None:
    space = case.space(sharing)
    questions = space.distributions()
    named = set()
    patterns = list(case.brute(sharing))
    for layout in random.Random(3).sample(patterns, min(len(patterns), 150)):
        params = space.params_of(layout)
        assert params is not None
        replay = Replay(params)
        assert space.draw(replay) == layout
        assert replay.asked == params.keys()
        assert all(params[name] in questions[name] for name in params)
        named.add(tuple(sorted(params.items())))
    assert len(named) == min(len(patterns), 150)


@SHARING
def test_every_question_is_listed_and_asked_once_a_draw(sharing: str) -> None:
    case = CASES["all together"]
    space = case.space(sharing)
    asked: dict[str, tuple[Any, ...]] = {}

    class Recorder:
        def __init__(self, rng: random.Random) -> None:
            self.rng = rng
            self.names: list[str] = []

        def choose(self, name: str, options: Sequence[T]) -> T:
            self.names.append(name)
            asked[name] = tuple(options)
            return self.rng.choice(options)

    for seed in range(50):
        recorder = Recorder(random.Random(seed))
        space.draw(recorder)
        assert len(recorder.names) == len(set(recorder.names))
    assert asked == space.distributions()


def test_a_random_draw_shares_settings_across_the_study() -> None:
    space = space_of(["kda", "full"], 6, settings=TWO_FREE, sharing="study")
    for seed in range(40):
        layout = space.draw(RandomChooser(rng=random.Random(seed)))
        assert space.params_of(layout) is not None
        assert len({layer for layer in layout.layers if holds(layer, "kda")}) <= 1


TWO_FREE: Mapping[str, Mapping[str, Sequence[Value]]] = {
    "kda": {"head_dim": (16, 32, 64)},
    "full": {"kv_heads": (1, 2)},
}


def test_what_is_outside_has_no_choices() -> None:
    space = space_of(["kda", "full"], 2, settings=TWO_FREE, sharing="study")
    assert space.params_of(read("kda[head_dim=32] kda")) is None
    assert space.params_of(read("full[kv_heads=1] full[kv_heads=2]")) is None
    assert space.params_of(read("mla mla")) is None
    assert space.params_of(read("3*kda[head_dim=32]")) is None
    assert space.params_of(read("kda[head_dim=32]/none full[kv_heads=1]")) is None
    assert space.params_of(read("kda[head_dim=32] full[kv_heads=1]")) == {
        "0.mixer": "kda",
        "kda.head_dim": 32,
        "1.mixer": "full",
        "full.kv_heads": 1,
    }


def one_move(pattern: Sequence[Piece], other: Sequence[Piece], sharing: str) -> bool:
    """Whether two patterns differ by one layer, by one swap, or in a study by one word's settings everywhere."""
    places = [place for place, (a, b) in enumerate(zip(pattern, other, strict=True)) if a != b]
    if len(places) == 1:
        return True
    if len(places) == 2 and [pattern[place] for place in places] == [
        other[place] for place in reversed(places)
    ]:
        return True
    if sharing == "layer":
        return False
    moved = {pattern[place].entry for place in places}
    return len(moved) == 1 and all(
        a.entry == b.entry and a.channel == b.channel and (a.entry not in moved or a.values != b.values)
        for a, b in zip(pattern, other, strict=True)
    )


@EVERY_CASE
@SHARING
def test_neighbours_are_all_patterns_one_move_away(case: Case, sharing: str) -> None:
    space, brute = case.space(sharing), case.brute(sharing)
    for layout in random.Random(4).sample(list(brute), min(len(brute), 4)):
        wanted = {
            other
            for other, pattern in brute.items()
            if other != layout and one_move(brute[layout], pattern, sharing)
        }
        found = space.neighbours(layout)
        assert len(found) == len(set(found))
        assert set(found) == wanted


@SHARING
def test_mutation_stays_inside_and_moves(sharing: str) -> None:
    case = CASES["all together"]
    space, brute, rng = case.space(sharing), case.brute(sharing), random.Random(5)
    layout, seen = space.sample(rng), set()
    for _ in range(150):
        moved = space.mutate(layout, rng)
        assert moved in brute and moved != layout
        layout = moved
        seen.add(layout)
    assert len(seen) > 20
    lonely = space_of(["full"], 2, settings={"full": {"kv_heads": ()}})
    assert lonely.mutate(read("2*full"), rng) == read("2*full")


@SHARING
@pytest.mark.parametrize(
    "constraints",
    [["full>=4"], ["full>=1", "full<=0"], ["kv_bytes<=1k"], ["full>=3", "full not first"], ["mla>=1"]],
)
def test_a_space_without_patterns_says_so(constraints: list[str], sharing: str) -> None:
    space = space_of(["full", "kda"], 3, constraints=constraints, sharing=sharing)
    assert space.size().count == 0 and space.size().exact
    with pytest.raises(ValueError, match="loosen"):
        space.sample(random.Random(0))


def test_why_not_names_the_rule() -> None:
    space = space_of(["full", "kda"], 3, constraints=["full<=1", "kda not last", "delta>=1", "kv_bytes<=1MB"])
    assert "2 layers of full, at most 1" in str(space.why_not(read("2*full kda")))
    assert "kda stands last" in str(space.why_not(read("full 2*kda")))
    assert "at least 1" in str(space.why_not(read("mla mla full")))
    assert "kv_bytes is" in str(space.why_not(read("kda kda full")))
    # The mixers need not be of the space.
    assert space.why_not(read("kda 2*mamba2")) is None
    assert "kv_bytes is" in str(space.why_not(read("kda 2*mla")))


def test_large_spaces_are_counted() -> None:
    names = ["full", "window", "linear", "mamba2", "kda", "mla"]
    free = space_of(names, 24, channels=["swiglu", "none"], sharing="layer")
    assert free.size().exact and free.size().count == len(free.alphabet) ** 24
    bounded = space_of(names, 24, constraints=["full>=1", "attention<=4", "full not first"])
    letters, full = len(bounded.alphabet), sum(holds(layer, "full") for layer in bounded.alphabet)
    rest = letters - full
    choose = [1, 23, 253, 1771, 8855]
    assert bounded.size().count == sum(choose[n] * full**n * rest ** (24 - n) for n in range(1, 5))


def test_a_study_of_many_mixers_is_counted() -> None:
    space = space_of(["full", "window", "gla", "mamba2", "kda", "mla"], 8, sharing="study")
    values = [len([1 for owner, _, _ in space.alphabet.values() if owner == index]) for index in range(6)]
    wanted = 0
    for used in range(1, 7):
        for subset in itertools.combinations(values, used):
            ways = sum(
                (-1) ** (used - k) * len(list(itertools.combinations(range(used), k))) * k**8
                for k in range(1, used + 1)
            )
            product = 1
            for number in subset:
                product *= number
            wanted += ways * product
    assert space.size().count == wanted and space.size().exact


@SHARING
def test_what_is_too_large_to_count_under_bounds_is_bounded_from_above(
    sharing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["cache"]
    monkeypatch.setattr("search_space.walk.MOST_STATES", 5)
    monkeypatch.setattr("search_space.space.MOST_TABLES", 5)
    space = case.space(sharing)
    size = space.size()
    assert not size.exact
    assert size.count == replace(space, constraints=()).size().count > len(case.brute(sharing))
    assert space.sample(random.Random(0)) in case.brute(sharing)


def test_a_long_pattern_is_sampled_under_tight_rules() -> None:
    # More patterns than a float can hold.
    space = space_of(["full", "kda", "window", "mamba2"], 300, constraints=["full>=250"])
    assert count(space.sample(random.Random(0)), "full") >= 250


def test_names_of_families_stand_for_their_mixers() -> None:
    entries = make_entries(["delta", "attention", "full"], {}, FRAME)
    named = ["deltanet", "gated_delta", "kda", "rwkv7", "full", "differential", "cross_layer"]
    assert [entry.name for entry in entries] == named
    every = make_entries(sorted({spec.family for spec in VOCABULARY.values()}), {}, FRAME)
    assert {entry.name for entry in every} == set(VOCABULARY)


def test_searched_settings_vary_unless_told_otherwise() -> None:
    entries = {
        entry.name: dict(entry.free) for entry in make_entries(list(VOCABULARY), {}, Frame(width=2048))
    }
    assert entries["window"] == {"size": (128, 256, 512, 1024, 2048, 4096)}
    assert entries["full"] == {"kv_heads": (1, 2, 4, 8)}
    assert entries["kda"] == {"head_dim": (64, 128, 256)}
    pinned = make_entries(["kda"], {"kda": {"head_dim": (), "heads": (8, 16)}}, Frame(width=2048))
    assert pinned[0].free == (("heads", (8, 16)),)


def test_options_that_do_not_fit_the_frame_are_left_out() -> None:
    odd = make_entries(["full"], {}, Frame(width=2304))
    assert odd[0].free == (("kv_heads", (1, 2)),)
    with pytest.raises(ValueError, match="no value of kv_heads fits width 2304"):
        make_entries(["full"], {"full": {"kv_heads": (4, 8)}}, Frame(width=2304))


def test_options_that_do_not_fit_together_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="kv_heads=8 does not divide"):
        make_entries(["full"], {"full": {"heads": (4, 8), "kv_heads": (2, 8)}}, FRAME)


def test_whole_layers_keep_their_text() -> None:
    entries = make_entries(["window[size=512]|mamba2", "kda/none"], {}, FRAME)
    assert [entry.name for entry in entries] == ["window[size=512]|mamba2", "kda/none"]
    space = space_of(["window[size=512]|mamba2", "kda/none"], 2, channels=["none", "swiglu"])
    assert {str(layer) for layer in space.alphabet} >= {
        "window[size=512]|mamba2/none",
        "kda[head_dim=64]/none",
    } - {"kda[head_dim=64]/none"}
    assert sum(holds(layer, "kda") for layer in space.alphabet) == 1


@pytest.mark.parametrize(
    ("names", "settings", "says"),
    [
        (["kad"], {}, "did you mean kda"),
        (["atention"], {}, "did you mean attention"),
        (["kda[headdim=64]"], {}, "did you mean head_dim"),
        (["kda mla"], {}, "more than one layer"),
        (["kda|"], {}, "found the end"),
        (["kda"], {"kda": {"head_dims": (64,)}}, "did you mean head_dim"),
        (["kda"], {"kda": {"head_dim": (100,)}}, "multiple of 8"),
        (["full"], {"full": {"rotary": (0.5, 0.3)}}, "rotary=0.3"),
        (["kda"], {"mla": {"rank": (64,)}}, "which the space does not hold"),
        (["kda", "mla"], {"mal": {"rank": (64,)}}, "did you mean mla"),
        (["kda/none"], {"kda/none": {"head_dim": (64,)}}, "write its settings in the layer"),
        (["full[heads=6,kv_heads=4]"], {}, "does not divide"),
        ([], {}, "at least one mixer"),
    ],
)
def test_faults_in_a_space_are_named(names: list[str], settings: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says.replace("[", r"\[")):
        make_entries(names, settings, FRAME)


def test_channels_are_read() -> None:
    assert make_channels(["swiglu", "none", "swiglu", "swiglu[ratio=2]"]) == (
        Branch("swiglu"),
        Branch("none"),
        Branch("swiglu", (("ratio", 2.0),)),
    )
    for wrong, says in (
        ("swigul", "did you mean swiglu"),
        ("kda", "no channel mixer"),
        ("swiglu[ratio=2] kda", "one"),
    ):
        with pytest.raises(ValueError, match=says):
            make_channels([wrong])


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("full>=1", Count(what="full", least=1, most=None)),
        (" attention <= 2 ", Count(what="attention", least=0, most=2)),
        ("full not first", Place(what="full", where="first")),
        ("delta  not  last", Place(what="delta", where="last")),
        ("kv_bytes<=64MiB", Bound(cost="kv_bytes", most=64 * 2**20)),
        ("kv_bytes <= 64 MiB", Bound(cost="kv_bytes", most=64 * 2**20)),
        ("params<=2e9", Bound(cost="params", most=2e9)),
        ("flops_decode<=1.5GB", Bound(cost="flops_decode", most=1.5e9)),
    ],
)
def test_rules_are_read(text: str, rule: Any) -> None:
    assert read_constraint(text) == rule


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "write it like"),
        ("full", "write it like"),
        ("full=1", "write it like"),
        ("full>1", "write it like"),
        ("full not middle", "write it like"),
        ("ful>=1", "did you mean full"),
        ("atention not first", "did you mean attention"),
        ("kv_byte<=1k", "did you mean kv_bytes"),
        ("kv_bytes>=1k", "bounded from above"),
        ("kv_bytes<=lots", "is not a quantity"),
        ("full>=1.5", "not a number of layers"),
        ("full>=-1", "not a number of layers"),
        ("full>=²", "not a number of layers"),
        ("full>=1 2", "not a number of layers"),
    ],
)
def test_what_is_no_rule_is_named(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_constraint(text)


def test_uniform_patterns_are_one_for_each_entry() -> None:
    space = space_of(["full", "kda", "window[size=512]|mamba2"], 4, constraints=["delta<=2"])
    assert [str(layout) for layout in space.uniform()] == ["4*full", "4*window[size=512]|mamba2"]


def test_uniform_patterns_have_a_channel_mixer_of_the_space() -> None:
    """The usual one if it is allowed; what a layer names itself stays."""
    for channels, first in ((["none", "relu2"], "/none"), (["none", "swiglu"], "")):
        space = space_of(["full", "kda/geglu"], 2, channels=channels)
        assert [str(layout) for layout in space.uniform()] == [f"2*full{first}", "2*kda/geglu"]
