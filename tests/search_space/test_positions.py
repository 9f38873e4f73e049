"""Positions against independent tables and formulas: rotary scaling, slopes, xPos, and the frame that holds them."""

import cmath
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from search_space.frame import Frame
from search_space.mixers.full import Full
from search_space.mixers.lightning import Lightning
from search_space.mixers.mla import MLA
from search_space.mixers.window import Window
from search_space.positions import POSITIONS, Positions, Scaling, alibi_slopes

Far = Callable[[Tensor, Tensor], float]
FRAME = Frame(width=64, train_length=64, context=96, dtype="float32")
YARN = replace(FRAME, rotary_scaling="yarn", rotary_factor=8.0, rotary_length=32)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def published(kind: str, width: int, base: float, factor: float, length: int) -> tuple[Tensor, float]:
    """Frequencies and gain of the transformers package."""
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    name = {"ntk": "dynamic"}.get(kind, kind)
    parameters = {"rope_type": name, "rope_theta": base, "factor": factor}
    if kind == "yarn":
        parameters["original_max_position_embeddings"] = length
    config = LlamaConfig(
        hidden_size=4 * width, num_attention_heads=4, head_dim=width, max_position_embeddings=length,
        rope_parameters=parameters,
    )  # fmt: skip
    # Their base grows with the text; at this length it has grown by the factor.
    seen = length * (2 * factor - 1) / factor
    return ROPE_INIT_FUNCTIONS[name](config, None, torch.tensor(seen, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn"])
@pytest.mark.parametrize(("width", "base"), [(128, 1e4), (64, 1e6), (16, 5e5), (4, 1e4)])
@pytest.mark.parametrize(("factor", "length"), [(1.0, 4096), (4.0, 4096), (40.0, 4096), (2.5, 32)])
def test_frequencies_are_the_published_ones(
    kind: str, width: int, base: float, factor: float, length: int
) -> None:
    wanted, gain = published(kind, width, base, factor, length)
    scaling = Scaling(kind=kind, factor=factor, length=length if kind == "yarn" else None)
    torch.testing.assert_close(
        scaling.frequencies(width, base).double(), wanted.double(), rtol=1e-6, atol=1e-12
    )
    assert scaling.gain == pytest.approx(gain, rel=1e-9)


def test_frequencies_by_hand() -> None:
    plain = [1.0, 1e-1, 1e-2, 1e-3]
    for kind, wanted in (("none", plain), ("linear", [turn / 4 for turn in plain])):
        factor = 1.0 if kind == "none" else 4.0
        assert Scaling(kind=kind, factor=factor).frequencies(8, 1e4).tolist() == pytest.approx(wanted)
    # The fastest pair stays, the slowest is divided by the factor.
    ntk = Scaling(kind="ntk", factor=4.0).frequencies(8, 1e4)
    assert ntk[0] == 1 and float(ntk[-1]) == pytest.approx(1e-3 / 4)
    assert Scaling(kind="ntk", factor=4.0).frequencies(2, 1e4).tolist() == [1.0]
    yarn = Scaling(kind="yarn", factor=40.0, length=4096).frequencies(64, 1e4)
    plain_turns = Scaling().frequencies(64, 1e4)
    # Of 32 pairs those before the eleventh turn 32 times and more, those from the twenty-third on less than once.
    assert torch.equal(yarn[:11], plain_turns[:11])
    torch.testing.assert_close(yarn[23:], plain_turns[23:] / 40)
    # Halfway along the ramp of index, half of each.
    torch.testing.assert_close(yarn[16], plain_turns[16] * (1 - 6 / 13 + 6 / 13 / 40))


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 16, 20, 32])
def test_slopes_are_blooms(heads: int) -> None:
    pytest.importorskip("transformers")
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    wanted = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(torch.tensor(alibi_slopes(heads)), wanted, rtol=1e-6, atol=0)


def test_slopes_by_hand() -> None:
    assert alibi_slopes(8) == [2.0**-power for power in range(1, 9)]
    assert alibi_slopes(12) == [2.0**-power for power in range(1, 9)] + [
        2.0**-power for power in (0.5, 1.5, 2.5, 3.5)
    ]


@pytest.mark.parametrize("start", [0, 700])
def test_xpos_is_its_formula(start: int) -> None:
    positions = Positions.of(FRAME, "xpos", 1.0)
    q, k = torch.randn(1, 6, 1, 16), torch.randn(1, 6, 1, 16)
    back = torch.arange(5, -1, -1)
    turned_q = positions.fade(positions.turn(q, start), -back)
    turned_k = positions.fade(positions.turn(k, start), back)
    for t in range(6):
        for s in range(t + 1):
            score = 0.0
            for i in range(8):
                keep = ((2 * i / 16 + 0.4) / 1.4) ** ((t - s) / 512)
                turn = cmath.exp(1j * (t - s) * 1e4 ** (-2 * i / 16))
                one = complex(q[0, t, 0, i], q[0, t, 0, i + 8])
                score += (one * complex(k[0, s, 0, i], k[0, s, 0, i + 8]).conjugate() * keep * turn).real
            got = float((turned_q[0, t, 0] * turned_k[0, s, 0]).sum())
            assert got == pytest.approx(score, rel=1e-3, abs=2e-3 if start else 1e-4)


def test_what_fades_stays_finite_however_long_the_text() -> None:
    mixer = Window(position="xpos", size=8, sinks=1, heads=1, head_dim=8).build(replace(FRAME, width=8))
    x = torch.randn(1, 20_000, 8)
    whole, _ = mixer(x)
    assert whole.isfinite().all()
    state: Any
    _, state = mixer(x[:, :19_000], mixer.start(1, 20_000))
    rest, _ = mixer(x[:, 19_000:], state)
    torch.testing.assert_close(rest, whole[:, 19_000:], rtol=1e-3, atol=1e-4)
    step, _ = mixer.step(x[:, 19_000], mixer(x[:, :19_000], mixer.start(1, 20_000))[1])
    torch.testing.assert_close(step, whole[:, 19_000], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cls", [Full, Window])
def test_kinds_of_positions_differ_and_none_is_none(cls: Any, far: Far) -> None:
    x, outputs = torch.randn(2, 40, 64), {}
    for kind in POSITIONS:
        torch.manual_seed(0)
        outputs[kind] = cls(position=kind).build(FRAME)(x)[0]
    torch.manual_seed(0)
    still = cls(rotary=0.0).build(FRAME)(x)[0]
    assert torch.equal(outputs["none"], still)
    torch.manual_seed(0)
    assert torch.equal(cls(position="xpos", rotary=0.0).build(FRAME)(x)[0], still)
    kinds = list(POSITIONS)
    for number, kind in enumerate(kinds):
        for other in kinds[:number]:
            assert far(outputs[kind], outputs[other]) > 1e-3, (kind, other)


def test_slopes_are_attention_with_linear_biases_written_out(far: Far) -> None:
    mixer: Any = Full(position="alibi", heads=4, kv_heads=2).build(FRAME)
    x = torch.randn(2, 40, 64)
    q, k, v = (layer(x).unflatten(-1, (-1, 16)) for layer in (mixer.query, mixer.key, mixer.value))
    rows = torch.zeros(2, 40, 4, 16)
    for head in range(4):
        scores = q[:, :, head] @ k[:, :, head // 2].mT / 4
        scores -= 2.0 ** (-2 * (head + 1)) * (torch.arange(40)[:, None] - torch.arange(40))
        scores.masked_fill_(~torch.ones(40, 40, dtype=torch.bool).tril(), -torch.inf)
        rows[:, :, head] = scores.softmax(-1) @ v[:, :, head // 2]
    assert far(mixer(x)[0], mixer.out(rows.flatten(2))) < 1e-5


@pytest.mark.parametrize(
    "spec", [Full(), Window(size=16), MLA(), Lightning(rotary=0.5), Full(position="xpos")]
)
@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn"])
def test_the_frames_scaling_reaches_the_mixers(spec: Any, kind: str, far: Far) -> None:
    frame = replace(YARN, rotary_scaling=kind, rotary_length=32 if kind == "yarn" else None)
    x, outputs = torch.randn(1, 40, 64), []
    for own in (FRAME, frame):
        torch.manual_seed(0)
        mixer = spec.build(own)
        outputs.append(mixer(x)[0])
    assert far(outputs[1], outputs[0]) > 1e-3
    state, rows = mixer.start(1, 40), []
    for t in range(40):
        y, state = mixer.step(x[:, t], state)
        rows.append(y)
    assert far(torch.stack(rows, dim=1), outputs[1]) < 1e-4


@pytest.mark.parametrize(
    "spec", [Full(rotary=0.0), Full(position="alibi"), Window(position="none"), MLA(rotary=0.0)]
)
def test_what_does_not_turn_is_not_scaled(spec: Any) -> None:
    outputs = []
    for own in (FRAME, YARN):
        torch.manual_seed(0)
        outputs.append(spec.build(own)(torch.ones(1, 9, 64).cumsum(1))[0])
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            {"rotary_scaling": "dynamic"},
            "rotary_scaling 'dynamic' is unknown: use one of none, linear, ntk, yarn",
        ),
        ({"rotary_scaling": "linear", "rotary_factor": 0.5}, "rotary_factor 0.5"),
        ({"rotary_scaling": "linear", "rotary_factor": math.nan}, "rotary_factor nan"),
        ({"rotary_factor": 2.0}, "rotary_factor 2 is not valid"),
        ({"rotary_scaling": "yarn", "rotary_factor": 2.0}, "rotary_length None is not valid with .* yarn"),
        ({"rotary_scaling": "ntk", "rotary_factor": 2.0, "rotary_length": 64}, "rotary_length 64"),
        ({"rotary_scaling": "yarn", "rotary_length": 0}, "rotary_length 0"),
        ({"rotary_base": 1.0}, "rotary_base 1 "),
    ],
)
def test_wrong_scalings_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Frame(width=64, **wrong)
