"""What every mixer promises, asked of the whole vocabulary: a new word is tested by being listed."""

import json
import random
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from search_space.cost import build_mixer, layer_cost
from search_space.entries import ALL
from search_space.family import FAMILIES
from search_space.frame import Frame
from search_space.layout import Branch, Layer, Layout, from_json
from search_space.setting import Value, settings_of
from search_space.spec import Mixer, Stream, shrink
from search_space.state import state_bytes
from search_space.vocabulary import VOCABULARY, branch_of, mixer_of, read

FRAME = Frame(width=64, train_length=64, context=96, dtype="float32", vocabulary=64)
SIZES = {
    "tokens": (4, 8, 20, 48),
    "chunk": (16, 32, 48),
    "head": (8, 16, 24),
    "state": (8, 16, 24),
    "rank": (8, 16, 40),
    "heads": (1, 2, 4, 6),
    "groups": (1, 2, 3),
}
CHOOSERS = {"dsa"}
"""Words that choose single tokens by score: rounding may exchange two of nearly one score, and a token need not be read."""
KEEPS_NOTHING = {"gmu"}
"""Words that keep nothing and see no past by themselves: they gate what another layer keeps."""
LATE = {"infini", "compressive", "linformer", "lolcats", "retrieval"}
"""Words with parts that work on what has long passed: they learn in longer lessons."""
NOTHING = Branch("none")
LONGEST = 75
MOST_DRAWS = 200
"""A word with few settings has fewer draws than are asked for."""


def draws(name: str, count: int = 4) -> list[Layer]:
    """The word with its defaults, and some random settings of small size that fit together."""
    rng = random.Random(name)
    found = [Layer((Branch(name),), NOTHING)]
    for _ in range(MOST_DRAWS):
        if len(found) > count:
            break
        chosen: dict[str, Value] = {}
        for setting in settings_of(VOCABULARY[name]):
            if rng.random() < 0.75:
                chosen[setting.name] = rng.choice(SIZES[setting.unit] if setting.unit else setting.options)
        spec = VOCABULARY[name](**chosen)
        try:
            spec.sized(FRAME)
        except ValueError:
            continue
        layer = Layer((branch_of(spec),), NOTHING)
        if layer not in found:
            found.append(layer)
    return found


LAYERS = [layer for name in VOCABULARY for layer in draws(name)]
# Halves of a mixer that a draw may miss, and two mixers side by side.
LAYERS += read(
    "hyena[filter=modal,groups=4,order=3]/none s4d[init=real]/none window[size=8]|mamba2/none "
    "window[size=8]|mamba2&sum/none full@1|kda@3&gate/none linear@2|shortconv@1|mla@1/none"
).layers


@pytest.fixture(params=LAYERS, ids=lambda layer: str(layer).removesuffix("/none"))
def layer(request: pytest.FixtureRequest) -> Layer:
    chosen: Layer = request.param
    return chosen


@pytest.fixture
def mixer(layer: Layer, shake: Callable[[nn.Module], None]) -> Mixer:
    made = build_mixer(layer, FRAME)
    shake(made)
    return made.eval()


def tokens(batch: int = 2, length: int = LONGEST, width: int = 64) -> Tensor:
    return torch.randn(batch, length, width)


def step_through(mixer: Mixer, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    outputs = []
    for t in range(x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        assert y.shape == x[:, t].shape
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def keeps(layer: Layer) -> bool:
    return any(branch.mixer not in KEEPS_NOTHING for branch in layer.branches)


def chooses(layer: Layer) -> bool:
    return any(branch.mixer in CHOOSERS for branch in layer.branches)


def error_of(got: Tensor, wanted: Tensor, layer: Layer) -> Tensor:
    """Root mean square of the error over that of what is wanted; of the better three quarters of rows where tokens are chosen."""
    rows = (got - wanted).square().mean(-1).flatten().sort().values
    kept = rows[: len(rows) * 3 // 4] if chooses(layer) else rows
    return (kept.mean() / wanted.square().mean()).sqrt()


def tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, tuple):
        return [tensor for part in state for tensor in tensors(part)]
    if is_dataclass(state):
        return [tensor for item in fields(state) for tensor in tensors(getattr(state, item.name))]
    return []


def test_price_names_every_parameter(layer: Layer) -> None:
    priced = layer_cost(layer, FRAME).params - FRAME.width
    assert sum(weight.numel() for weight in build_mixer(layer, FRAME).parameters()) == priced


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_price_names_every_byte_of_the_state(layer: Layer, dtype: str) -> None:
    for context, batch in ((1, 1), (7, 2), (LONGEST, 3), (200, 1)):
        frame = replace(FRAME, context=context, batch=batch, dtype=dtype)
        made = build_mixer(layer, frame)
        cost = layer_cost(layer, frame)
        assert state_bytes(made.start(batch, max_len=context)) == cost.stored_bytes
        assert bool(cost.read_bytes) == keeps(layer) and cost.read_bytes <= cost.stored_bytes
    frame = replace(FRAME, context=12, batch=2, dtype=dtype)
    made = build_mixer(layer, frame)
    stored, x = layer_cost(layer, frame).stored_bytes, tokens(length=12)
    for prefix in (1, 2, 9):
        _, state = made(x[:, :prefix], made.start(2, max_len=12))
        assert state_bytes(state) == stored
        _, state = step_through(made, x[:, prefix:], state)
        assert state_bytes(state) == stored
        # Nothing larger is kept alive behind the state: a view would hold on to a whole prefill.
        held = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in tensors(state)
        }
        assert sum(held.values()) == stored


def test_bytes_do_not_depend_on_the_module_being_in_low_precision(layer: Layer) -> None:
    frame = replace(FRAME, context=10, batch=2, dtype="bfloat16")
    made = build_mixer(layer, frame).bfloat16()
    x = tokens(length=10).bfloat16()
    y, state = made(x[:, :6], made.start(2, max_len=10))
    rest, state = step_through(made, x[:, 6:], state)
    assert y.dtype == rest.dtype == torch.bfloat16
    assert state_bytes(state) == layer_cost(layer, frame).stored_bytes


def test_a_low_precision_cache_stays_near_the_exact_one(layer: Layer) -> None:
    exact, x = build_mixer(layer, FRAME), tokens(length=40)
    rough = build_mixer(layer, replace(FRAME, dtype="bfloat16"))
    rough.load_state_dict(exact.state_dict())
    y, _ = step_through(exact, x, exact.start(2, 40))
    z, _ = step_through(rough, x, rough.start(2, 40))
    assert 0 < error_of(z, y, layer) < 0.03 or torch.equal(y, z)
    assert ("full" in str(layer)) <= (not torch.equal(y, z))


def test_no_future(mixer: Mixer) -> None:
    x = tokens()
    y, _ = mixer(x)
    for t in (0, 2, 40, 63, 64, LONGEST - 2):
        changed = x.clone()
        changed[:, t + 1 :] = 10 * torch.randn_like(changed[:, t + 1 :])
        z, _ = mixer(changed)
        torch.testing.assert_close(z[:, : t + 1], y[:, : t + 1], rtol=1e-5, atol=1e-6)
        assert (z[:, t + 1] - y[:, t + 1]).abs().max() > 1e-3
        assert (z[:, -1] - y[:, -1]).abs().max() > 1e-3


def test_a_token_from_the_past_is_seen(mixer: Mixer, layer: Layer) -> None:
    x = tokens()
    # The next token sees it; where tokens are chosen, one of the later ones does.
    place, last = (30, LONGEST) if chooses(layer) else (70, 72)
    changed = x.clone()
    changed[:, place] = torch.randn_like(changed[:, place])
    y, z = mixer(x)[0], mixer(changed)[0]
    seen = (z[:, place + 1 : last] - y[:, place + 1 : last]).abs().max()
    assert seen > 1e-4 if keeps(layer) else seen == 0


def test_no_gradient_reaches_the_future(mixer: Mixer) -> None:
    x = tokens(batch=1).requires_grad_()
    mixer(x)[0][:, 30].sum().backward()
    assert x.grad is not None
    assert x.grad[:, 31:].abs().max() == 0
    assert x.grad[:, 30].abs().max() > 0


def test_step_equals_forward(mixer: Mixer, far: Callable[[Tensor, Tensor], float]) -> None:
    x = tokens()
    with torch.no_grad():
        stepped, state = step_through(mixer, x, mixer.start(2, LONGEST + 5))
        for length in (1, 3, 16, 63, 64, 65, LONGEST):
            y, none = mixer(x[:, :length])
            assert none is None
            assert far(stepped[:, :length], y) < 1e-4
        # Both ways leave the same state: what follows is the same.
        _, carried = mixer(x, mixer.start(2, LONGEST + 5))
        more = tokens(length=5)
        assert far(step_through(mixer, more, state)[0], mixer(more, carried)[0]) < 1e-4


@pytest.mark.parametrize(("prefix", "length"), [(1, 12), (2, 20), (21, LONGEST), (64, LONGEST)])
def test_step_equals_forward_from_a_carried_state(
    mixer: Mixer, prefix: int, length: int, far: Callable[[Tensor, Tensor], float]
) -> None:
    x = tokens(length=length)
    with torch.no_grad():
        whole, _ = mixer(x)
        _, state = mixer(x[:, :prefix], mixer.start(2, LONGEST))
        rest, _ = step_through(mixer, x[:, prefix:], state)
        assert far(rest, whole[:, prefix:]) < 1e-4


@pytest.mark.parametrize(
    "cuts", [(1,), (2,), (3,), (10,), (31,), (63,), (64,), (74,), (1, 2, 3), (5, 6, 60), (40, 42)], ids=str
)
def test_prefill_can_be_cut_anywhere(
    mixer: Mixer, cuts: tuple[int, ...], far: Callable[[Tensor, Tensor], float]
) -> None:
    x = tokens()
    with torch.no_grad():
        whole, _ = mixer(x)
        state, parts = mixer.start(2, LONGEST), []
        for start, end in zip((0, *cuts), (*cuts, LONGEST), strict=True):
            y, state = mixer(x[:, start:end], state)
            parts.append(y)
        assert far(torch.cat(parts, dim=1), whole) < 1e-4


def test_more_tokens_than_the_state_can_take_are_refused_or_handled(
    mixer: Mixer, far: Callable[[Tensor, Tensor], float]
) -> None:
    x = tokens(length=12)
    with torch.no_grad():
        whole, _ = mixer(x)
        for cut in (12, 5):
            answer = run_or_refuse(mixer, x, cut)
            if isinstance(answer, ValueError):
                assert "max_len" in str(answer)
            else:
                assert far(answer, whole) < 1e-4


def run_or_refuse(mixer: Mixer, x: Tensor, cut: int) -> Tensor | ValueError:
    """Prefill up to the cut and steps from there, with a state made for eight tokens."""
    try:
        y, state = mixer(x[:, :cut], mixer.start(2, max_len=8))
        return torch.cat([y, step_through(mixer, x[:, cut:], state)[0]], dim=1) if cut < x.shape[1] else y
    except ValueError as error:
        return error


@pytest.mark.parametrize("name", ["full", "mla", "window[size=16]"])
def test_a_cache_that_is_full_says_so(name: str) -> None:
    mixer = build_mixer(read(name).layers[0], FRAME)
    x = tokens(length=9)
    with pytest.raises(ValueError, match="larger max_len"):
        mixer(x, mixer.start(2, max_len=8))
    _, state = mixer(x[:, :8], mixer.start(2, max_len=8))
    with pytest.raises(ValueError, match="larger max_len"):
        mixer.step(x[:, 8], state)


def test_each_sequence_of_a_batch_is_alone(mixer: Mixer, far: Callable[[Tensor, Tensor], float]) -> None:
    x = tokens(batch=3, length=20)
    with torch.no_grad():
        together, _ = mixer(x)
        stepped, _ = step_through(mixer, x, mixer.start(3, 20))
        for row in range(3):
            assert far(together[row : row + 1], mixer(x[row : row + 1])[0]) < 1e-5
        assert far(stepped[1:2], step_through(mixer, x[1:2], mixer.start(1, 20))[0]) < 1e-5


def test_a_state_is_made_where_the_module_is(layer: Layer) -> None:
    made = build_mixer(layer, FRAME).to("meta")
    held = {tensor.device.type for tensor in tensors(made.start(2, 8))}
    assert held == ({"meta"} if keeps(layer) else set())


def test_zeros_in_give_numbers_out(mixer: Mixer) -> None:
    x = torch.zeros(1, 20, 64)
    assert mixer(x)[0].isfinite().all()
    assert step_through(mixer, x, mixer.start(1, 20))[0].isfinite().all()


def lesson_length(layer: Layer) -> int:
    """Tokens of a lesson in which every part of the layer has work: beyond its spans where it has parts that are late."""
    if not any(branch.mixer in LATE for branch in layer.branches):
        return 24
    specs = [mixer_of(branch).sized(FRAME) for branch in layer.branches]
    spans = [
        getattr(spec, own.name) for spec in specs for own in settings_of(type(spec)) if own.unit == "tokens"
    ]
    return max(24, 2 * sum(spans) + 4)


def lesson(length: int = 24) -> tuple[Tensor, Tensor]:
    """Sequences whose answer at each token mixes it with the one before, as a residual layer must learn."""
    x = torch.randn(4, length, 64)
    before = torch.cat([torch.zeros(4, 1, 64), x[:, :-1]], dim=1)
    return x, torch.tanh(x @ torch.randn(64, 64) / 8 + before @ torch.randn(64, 64) / 8)


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_it_learns(layer: Layer, low: bool) -> None:
    mixer = build_mixer(layer, FRAME)
    x, wanted = lesson(lesson_length(layer))
    optimiser = torch.optim.Adam(mixer.parameters(), lr=1e-2)
    losses = []
    for number in range(30):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            y, _, stream = mixer.forward_with(x, None, Stream())
        loss = (y.float() - wanted).square().mean()
        optimiser.zero_grad()
        sum(stream.losses, loss).backward()  # type: ignore[no-untyped-call]
        for name, weight in mixer.named_parameters():
            assert weight.grad is not None, name
            assert weight.grad.isfinite().all(), name
            assert number or weight.grad.abs().max() > 0, f"{name} is dead"
        optimiser.step()
        losses.append(loss.item())
        if number >= 5 and losses[-1] < 0.75 * losses[0]:
            return
    raise AssertionError(f"learnt too little: {losses}")


def test_autocast_keeps_the_output_near(mixer: Mixer, layer: Layer) -> None:
    x = tokens(length=30)
    with torch.no_grad():
        exact, _ = mixer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough, state = mixer(x[:, :20], mixer.start(2, 30))
            rest, _ = step_through(mixer, x[:, 20:], state)
    rough = torch.cat([rough, rest], dim=1).float()
    assert error_of(rough, exact, layer) < 0.05


def test_text_and_json_round_trip(layer: Layer) -> None:
    layout = Layout((layer,) * 3)
    assert read(str(layout)) == layout
    assert from_json(json.loads(layout.dump())) == layout
    for branch in layer.branches:
        assert replace(branch_of(mixer_of(branch)), share=branch.share) == branch


def test_shrinking_to_half_builds(layer: Layer) -> None:
    proxy = replace(FRAME, width=32, train_length=32)
    for branch in layer.branches:
        small = shrink(mixer_of(branch), FRAME, proxy)
        x = torch.randn(1, 9, 32)
        assert small.build(proxy)(x)[0].shape == x.shape


@pytest.mark.parametrize("name", VOCABULARY)
def test_a_word_says_who_it_is(name: str) -> None:
    spec = VOCABULARY[name]
    assert spec.name == name and spec.__doc__
    # A name that is a family's too would stand for either of them in a space or a rule.
    assert spec.family in FAMILIES and name not in FAMILIES and name != ALL
    assert "arXiv" in spec.source
    assert spec().build(FRAME).__doc__
