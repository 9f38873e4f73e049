"""What layers take from one another: a cache that several read, and a scan that later layers gate."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_space.cost import build_mixer, costs_by_name, frames_of, layer_cost, layout_cost
from search_space.frame import Frame
from search_space.mixers.cross_layer import CrossLayer
from search_space.mixers.full import Full
from search_space.mixers.window import Window
from search_space.spec import Stream
from search_space.state import state_bytes
from search_space.vocabulary import read
from trainers.measure import measure_layer
from trainers.model import Stack

Far = Callable[[Tensor, Tensor], float]
Shake = Callable[[nn.Module], None]
FRAME = Frame(width=64, train_length=64, context=48, dtype="float32", vocabulary=64)
LAYOUTS = [
    "4*cross_layer",
    "3*cross_layer[every=0] full cross_layer[every=0]",
    "5*cross_layer[size=8,meta=4] cross_layer[size=16]",
    "2*(cross_layer[every=0,kv_heads=1,value_ratio=2,meta=16] kda)",
    "mamba gmu 2*(gmu mamba[expand=1]) gmu",
    "gmu mamba 2*(gmu cross_layer[every=0])",
    "cross_layer[size=8]|mamba window|gmu cross_layer[size=8]|gmu",
]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=LAYOUTS)
def stack(request: pytest.FixtureRequest, shake: Shake) -> Stack:
    made = Stack(read(request.param), FRAME)
    shake(made)
    return made.eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("text", LAYOUTS)
def test_a_network_costs_what_it_holds(text: str, dtype: str) -> None:
    layout, frame = read(text), replace(FRAME, dtype=dtype, batch=2)
    stack, cost = Stack(layout, frame), layout_cost(layout, frame)
    assert sum(weight.numel() for weight in stack.parameters()) == cost.params
    assert state_bytes(stack.start(2, frame.context)) == cost.stored_bytes
    frames = frames_of(layout, frame)
    parts = [layer_cost(layer, own) for layer, own in zip(layout.layers, frames, strict=True)]
    assert sum(part.params for part in parts) == cost.params
    for block, part in zip(stack.blocks, parts, strict=True):
        assert sum(weight.numel() for weight in block.parameters()) == part.params


def test_steps_are_the_whole_and_a_prefill_can_be_cut(stack: Stack, far: Far) -> None:
    x = torch.randn(2, 48, 64)
    whole, _ = stack(x)
    for cut in (0, 1, 7, 8, 9, 30, 48):
        states: Any = stack.start(2, 48)
        parts = []
        if cut:
            y, states = stack(x[:, :cut], states)
            parts.append(y)
        if cut == 30:
            y, states = stack(x[:, 30:41], states)
            parts.append(y)
        for t in range(41 if cut == 30 else cut, 48):
            y, states = stack.step(x[:, t], states)
            parts.append(y[:, None])
        assert far(torch.cat(parts, dim=1), whole) < 1e-5, cut


def test_no_layer_sees_the_future(stack: Stack) -> None:
    x = torch.randn(2, 48, 64)
    changed = x.clone()
    changed[:, 30:] = torch.randn(2, 18, 64)
    assert torch.equal(stack(x)[0][:, :30], stack(changed)[0][:, :30])


def test_every_parameter_has_a_gradient(stack: Stack) -> None:
    with torch.enable_grad():
        y, _ = stack(torch.randn(2, 48, 64))
        y.square().sum().backward()
    for name, weight in stack.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.any(), name


@pytest.mark.parametrize(
    ("text", "makers"),
    [
        ("6*cross_layer", [0, 2, 4]),
        ("7*cross_layer[every=3]", [0, 3, 6]),
        ("4*cross_layer[every=0]", [0]),
        ("full cross_layer kda cross_layer cross_layer", [1, 4]),
        # Other settings, another cache.
        ("2*(cross_layer[size=8] cross_layer[size=16])", [0, 1]),
    ],
)
def test_runs_of_layers_share_a_cache(text: str, makers: list[int]) -> None:
    layout = read(text)
    frames = frames_of(layout, FRAME)
    kept = [
        index
        for index, (layer, own) in enumerate(zip(layout.layers, frames, strict=True))
        if "cross_layer" in str(layer) and layer_cost(layer, own).stored_bytes
    ]
    assert kept == makers


@pytest.mark.parametrize("size", [0, 8])
def test_the_first_is_full_or_windowed_attention(size: int, far: Far) -> None:
    ours: Any = CrossLayer(size=size, kv_heads=1).build(FRAME)
    theirs: Any = (Window(size=size, kv_heads=1) if size else Full(kv_heads=1)).build(FRAME)
    for name in ("query", "key", "value", "out"):
        getattr(theirs, name).load_state_dict(getattr(ours, name).state_dict())
    x = torch.randn(2, 40, 64)
    assert far(ours(x)[0], theirs(x)[0]) < 1e-6


@pytest.mark.parametrize("size", [0, 8])
def test_a_later_layer_reads_the_keys_of_the_first(size: int, far: Far) -> None:
    layout = read(f"2*cross_layer[size={size},heads=2,head_dim=16,value_ratio=2,meta=4,rotary=0]/none")
    first, later = (
        build_mixer(layer, own) for layer, own in zip(layout.layers, frames_of(layout, FRAME), strict=True)
    )
    maker: Any = first
    reader: Any = later
    x, other = torch.randn(2, 40, 64), torch.randn(2, 40, 64)
    _, _, stream = maker.forward_with(x, None, Stream())
    got = reader.forward_with(other, None, stream)[0]
    k = torch.cat([maker.meta_keys.expand(2, -1, -1, -1), maker.key(x).view(2, 40, 2, 16)], dim=1)
    v = torch.cat([maker.meta_values.expand(2, -1, -1, -1), maker.value(x).view(2, 40, 2, 32)], dim=1)
    q = reader.query(other).view(2, 40, 2, 16)
    scores = torch.einsum("bthk,bshk->bhts", q, k) / 4
    back = torch.arange(40)[:, None] - torch.arange(40)
    seen = (back >= 0) & ((back < size) | (size == 0))
    seen = torch.cat([torch.ones(40, 4, dtype=torch.bool), seen], dim=1)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    wanted = torch.einsum("bhts,bshv->bthv", weights, v).flatten(2) @ reader.out.weight.T
    assert far(got, wanted) < 1e-5


def test_what_is_read_is_priced_by_hand() -> None:
    frame = Frame(width=2048, context=32768)
    layout = read("2*cross_layer[size=1024,heads=16,kv_heads=4,head_dim=64,value_ratio=2,meta=128]/none")
    first, later = (
        layer_cost(layer, own) for layer, own in zip(layout.layers, frames_of(layout, frame), strict=True)
    )
    held = (1024 + 128) * 4 * (64 + 128) * 2
    assert (first.stored_bytes, first.read_bytes, later.stored_bytes, later.read_bytes) == (
        held,
        held,
        0,
        held,
    )
    asked, made = 2048 * 16 * (64 + 128), 2048 * 4 * (64 + 128)
    assert later.params == asked + 2048
    assert first.params == asked + made + 128 * 4 * (64 + 128) + 2048
    assert later.flops_decode == 2 * asked + 2 * 16 * (64 + 128) * (1024 + 128)


def test_a_bound_never_takes_a_layer_for_cheaper_than_it_may_be() -> None:
    frame = Frame(width=512, context=1000)
    for text in ("cross_layer[every=0]", "gmu", "rwkv7"):
        layer = read(text).layers[0]
        bound = costs_by_name(layer, frame)
        for own in frames_of(read(f"mamba 3*{text}"), frame)[1:]:
            cost = layer_cost(layer, own)
            assert cost.stored_bytes <= bound["kv_bytes"] and cost.params <= bound["params"], text
            assert cost.flops_decode <= bound["flops_decode"]


def test_a_gate_reads_the_last_scan_before_it(far: Far) -> None:
    layout = read("mamba/none mamba[expand=1]/none gmu/none")
    frames = frames_of(layout, FRAME)
    first, last, gate = (build_mixer(layer, own) for layer, own in zip(layout.layers, frames, strict=True))
    x, other = torch.randn(2, 20, 64), torch.randn(2, 20, 64)
    stream = Stream()
    for mixer in (first, last):
        _, _, stream = mixer.forward_with(x, None, stream)
    unit: Any = gate
    scanned = stream.values["scanned.64"]
    wanted = (scanned * F.silu(other @ unit.gate.weight.T)) @ unit.out.weight.T
    assert far(unit.forward_with(other, None, stream)[0], wanted) < 1e-6
    # What was scanned, gated by Mamba itself, is what Mamba gives.
    mamba: Any = last
    own = scanned * F.silu(mamba.enter(x).chunk(2, dim=-1)[1])
    assert far(mamba(x)[0], own @ mamba.out.weight.T) < 1e-6


def test_a_layer_that_misses_its_source_says_so() -> None:
    layout = read("mamba 2*cross_layer gmu")
    frames = frames_of(layout, FRAME)
    x = torch.randn(1, 5, 64)
    for index, message in (
        (2, "cross_layer: the stream holds no keys"),
        (3, "gmu: the stream holds no scan"),
    ):
        with pytest.raises(ValueError, match=message):
            build_mixer(layout.layers[index], frames[index])(x)


@pytest.mark.parametrize("text", ["cross_layer[size=8,meta=4]", "gmu", "mamba|gmu"])
def test_such_layers_can_be_measured_alone(text: str) -> None:
    assert measure_layer(read(text).layers[0], FRAME, "decode").latency_ms > 0
