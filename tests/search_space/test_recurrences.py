"""Elementwise recurrences and networks that walk: special cases that are another formula, and prices by hand."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_space.frame import Frame
from search_space.mixers.clockwork import Clockwork
from search_space.mixers.lstm import LSTM, LSTMMixer
from search_space.mixers.mamba import Mamba, MambaMixer
from search_space.mixers.mingru import MinGRU, MinGRUMixer
from search_space.mixers.rglru import RGLRU, RGLRUMixer
from search_space.mixers.sru import SRU, SRUMixer
from search_space.spec import Mixer, MixerSpec, shrink

Far = Callable[[Tensor, Tensor], float]
Shake = Callable[[nn.Module], None]
LENGTH = 70


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def x_of(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, 64)


def built(spec: MixerSpec, small: Frame, shake: Shake) -> Mixer:
    mixer = spec.build(small)
    shake(mixer)
    return mixer


def naive_convolution(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """The taps times the last inputs, the last tap on the newest, as one sum a token."""
    width = taps.shape[1]
    return torch.stack(
        [
            bias + sum(taps[:, width - 1 - back] * x[:, t - back] for back in range(min(width, t + 1)))
            for t in range(x.shape[1])
        ],
        dim=1,
    )


def gain(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("taps", [4, 2])
def test_mamba_is_its_loop_written_out(small: Frame, norms: bool, taps: int, far: Far, shake: Shake) -> None:
    mixer = built(Mamba(state=16, expand=1.5, rank=24, taps=taps, norms=norms), small, shake)
    assert isinstance(mixer, MambaMixer)
    x = x_of()
    entered = mixer.enter(x)
    mixed = F.silu(naive_convolution(entered[..., :96], mixer.taps, mixer.taps_bias))
    chosen = mixer.select(mixed)
    step, write, read = chosen[..., :24], chosen[..., 24:40], chosen[..., 40:]
    if norms:
        step, write, read = (
            gain(part, norm.weight) for part, norm in zip((step, write, read), mixer.norms, strict=True)
        )
    delta = torch.log1p(torch.exp(step @ mixer.step_up.weight.T + mixer.step_bias))
    matrix, rows = torch.zeros(2, 96, 16), []
    for t in range(LENGTH):
        fade = torch.exp(-delta[:, t, :, None] * mixer.log_rate.exp())
        matrix = fade * matrix + (delta[:, t] * mixed[:, t])[..., None] * write[:, t, None]
        rows.append((matrix * read[:, t, None]).sum(-1) + mixer.skip * mixed[:, t])
    y = torch.stack(rows, dim=1) * F.silu(entered[..., 96:])
    assert far(mixer(x)[0], mixer.out(y)) < 1e-4


def test_mamba_starts_as_published(small: Frame) -> None:
    mixer = Mamba(state=16).build(small)
    assert isinstance(mixer, MambaMixer)
    torch.testing.assert_close(mixer.log_rate.exp(), torch.arange(1.0, 17).expand(128, 16))
    steps = F.softplus(mixer.step_bias)
    assert 0.0009 < steps.min() < 0.005 and 0.02 < steps.max() < 0.11
    assert mixer.step_up.weight.abs().max() <= 8**-0.5
    for width, rank in ((2560, 160), (4096, 256), (768, 48), (2048, 128)):
        assert Mamba().sized(Frame(width=width)).rank == rank
    for width in range(16, 400, 8):
        assert Mamba().sized(Frame(width=width)).rank == max(8, math.floor(width / 128 + 0.5) * 8)


def sru_loop(mixer: SRUMixer, x: Tensor, scale: float, squash: bool) -> Tensor:
    """Equations 1 to 4 of the paper, one token after another, with the highway's scale of its appendix."""
    inner = mixer.inner
    weights = mixer.enter.weight
    by_cell = torch.zeros(2, inner) if mixer.peepholes is None else mixer.peepholes
    cell, rows = torch.zeros(x.shape[0], inner), []
    for t in range(x.shape[1]):
        new, forget, reset = (x[:, t] @ weights[part * inner : (part + 1) * inner].T for part in range(3))
        forget = torch.sigmoid(forget + by_cell[0] * cell + mixer.forget_bias)
        reset = torch.sigmoid(reset + by_cell[1] * cell + mixer.highway_bias)
        cell = forget * cell + (1 - forget) * new
        passing = x[:, t] if mixer.highway is None else mixer.highway(x[:, t])
        rows.append(reset * (cell.tanh() if squash else cell) + (1 - reset) * scale * passing)
    y = torch.stack(rows, dim=1)
    return y if mixer.out is None else mixer.out(y)


@pytest.mark.parametrize("peephole", [False, True])
@pytest.mark.parametrize("expand", [1.0, 1.5])
@pytest.mark.parametrize(("activation", "highway"), [("identity", 0), ("tanh", -2)])
def test_sru_is_its_loop_written_out(
    small: Frame, peephole: bool, expand: float, activation: str, highway: int, far: Far, shake: Shake
) -> None:
    spec = SRU(expand=expand, peephole=peephole, activation=activation, highway=highway)
    mixer = spec.build(small)
    assert isinstance(mixer, SRUMixer)
    torch.testing.assert_close(mixer.highway_bias, torch.full((int(64 * expand),), float(highway)))
    shake(mixer)
    assert (mixer.out is None) == (mixer.highway is None) == (expand == 1)
    x = x_of()
    wanted = sru_loop(mixer, x, math.sqrt(1 + 2 * math.e**highway), activation == "tanh")
    assert far(mixer(x)[0], wanted) < 1e-5


def test_peepholes_of_nought_are_no_peepholes(small: Frame, far: Far, shake: Shake) -> None:
    walked, scanned = SRU(peephole=True).build(small), SRU().build(small)
    shake(walked)
    assert isinstance(walked, SRUMixer) and walked.peepholes is not None
    scanned.load_state_dict(
        {name: weight for name, weight in walked.state_dict().items() if name != "peepholes"}
    )
    x = x_of()
    assert far(walked(x)[0], scanned(x)[0]) > 1e-2
    walked.peepholes.zero_()
    assert far(walked(x)[0], scanned(x)[0]) < 1e-5


def test_a_shut_highway_gate_lets_the_input_by(small: Frame, far: Far) -> None:
    mixer = SRU(highway=-1).build(small)
    assert isinstance(mixer, SRUMixer)
    mixer.highway_bias.fill_(-50)
    x = x_of()
    assert far(mixer(x)[0], math.sqrt(1 + 2 / math.e) * x) < 1e-5


def test_mingru_in_logarithms_is_mingru(small: Frame, far: Far) -> None:
    """The paper's own way: h = exp(a* + logcumsumexp(log b - a*)), a* the running sum of log(1 - z)."""
    mixer = MinGRU(expand=1.5).build(small)
    assert isinstance(mixer, MinGRUMixer)
    x = 2 * x_of()
    candidate, gate = mixer.enter(x).double().chunk(2, dim=-1)
    assert candidate.min() < -0.5 and candidate.max() > 0.5
    offered = torch.where(candidate >= 0, (F.relu(candidate) + 0.5).log(), -F.softplus(-candidate))
    kept = -F.softplus(gate).cumsum(1)
    hidden = torch.exp(kept + torch.logcumsumexp(offered - F.softplus(-gate) - kept, dim=1))
    assert far(mixer(x)[0], mixer.out(hidden.float())) < 1e-5


@pytest.mark.parametrize("candidate", ["positive", "linear"])
def test_mingru_blends_its_state_with_a_candidate(
    small: Frame, candidate: str, far: Far, shake: Shake
) -> None:
    mixer = built(MinGRU(candidate=candidate), small, shake)
    assert isinstance(mixer, MinGRUMixer)
    x = x_of()
    hidden, rows = torch.zeros(2, 64), []
    for t in range(LENGTH):
        offered, gate = mixer.enter(x[:, t]).chunk(2, dim=-1)
        if candidate == "positive":
            offered = torch.where(offered >= 0, offered + 0.5, torch.sigmoid(offered))
        blend = torch.sigmoid(gate)
        hidden = (1 - blend) * hidden + blend * offered
        rows.append(hidden)
    states = torch.stack(rows, dim=1)
    assert (states.min() >= 0) == (candidate == "positive")
    assert far(mixer(x)[0], mixer.out(states)) < 1e-5


def rglru_loop(mixer: RGLRUMixer, x: Tensor, known: int = 0) -> Tensor:
    """Equations 1 to 4 of Griffin's paper; the first token of a text is not damped. `known` tokens give no output."""
    mixed = naive_convolution(mixer.enter(x), mixer.taps, mixer.taps_bias)
    heads, wide = mixer.heads, mixer.inner // mixer.heads
    rows, hidden = [], torch.zeros(x.shape[0], mixer.inner)
    for t in range(x.shape[1]):
        gates = []
        for kind in range(2):
            by_head = [
                mixed[:, t, head * wide : (head + 1) * wide] @ mixer.heads_weight[kind, head]
                for head in range(heads)
            ]
            gates.append(torch.sigmoid(torch.cat(by_head, dim=1) + mixer.heads_bias[kind]))
        # The logistic function of -rate is exp(-softplus(rate)).
        fade = torch.sigmoid(-mixer.rate).double() ** (8 * gates[1].double())
        damped = (1 - fade**2).sqrt() if t else torch.ones_like(fade)
        hidden = fade * hidden + damped * (gates[0] * mixed[:, t])
        rows.append(hidden.float())
    states = torch.stack(rows, dim=1) * F.gelu(mixer.gate(x), approximate="tanh")
    return mixer.out(states)[:, known:]


def test_rglru_is_its_loop_written_out(small: Frame, far: Far, shake: Shake) -> None:
    for spec in (RGLRU(), RGLRU(heads=3, head_dim=24)):
        mixer = built(spec, small, shake)
        assert isinstance(mixer, RGLRUMixer)
        x = x_of()
        assert far(mixer(x)[0], rglru_loop(mixer, x)) < 1e-5


def test_only_the_first_token_of_a_text_is_not_damped(small: Frame, far: Far, shake: Shake) -> None:
    mixer = built(RGLRU(), small, shake)
    assert isinstance(mixer, RGLRUMixer)
    mixer.heads_bias[1] -= 4  # Slow enough for damping to be strong.
    x = x_of(length=12)
    wanted = rglru_loop(mixer, x)
    for cut in (1, 5):
        y, state = mixer(x[:, :cut], mixer.start(2, 12))
        rest, _ = mixer(x[:, cut:], state)
        assert far(torch.cat([y, rest], dim=1), wanted) < 1e-5
        assert far(mixer.step(x[:, cut], state)[0], wanted[:, cut]) < 1e-5
        # Taken for a new text, the second part would come out larger.
        assert far(mixer(x[:, cut:])[0], wanted[:, cut:]) > 1e-1
    assert far(mixer.step(x[:, 0], mixer.start(2, 12))[0], wanted[:, 0]) < 1e-5


def test_rglru_fades_as_published(small: Frame) -> None:
    mixer = RGLRU(heads=40, head_dim=64).build(small)
    assert isinstance(mixer, RGLRUMixer)
    fades = torch.exp(-F.softplus(mixer.rate.double()))
    assert 0.899 < fades.min() < 0.905 and 0.995 < fades.max() <= 0.9991


@pytest.mark.parametrize("bias", [-200.0, -30.0, 30.0])
def test_gates_of_rglru_at_their_ends_have_finite_gradients(small: Frame, bias: float) -> None:
    mixer = RGLRU().build(small)
    assert isinstance(mixer, RGLRUMixer)
    mixer.heads_bias[1] = bias
    with torch.enable_grad():
        mixer(x_of())[0].square().sum().backward()
    for name, weight in mixer.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name


def test_lstm_is_its_loop_written_out(small: Frame, far: Far, shake: Shake) -> None:
    """Greff et al., section 2, without peepholes; torch's order of the gates is in, forget, candidate, out."""
    for spec in (LSTM(), LSTM(ratio=0.5, forget=3.0)):
        mixer = built(spec, small, shake)
        assert isinstance(mixer, LSTMMixer)
        own, wide = mixer.weights(), mixer.hidden
        x, hidden, cell, rows = x_of(), torch.zeros(2, wide), torch.zeros(2, wide), []
        for t in range(LENGTH):
            said = own["weight_ih_l0"] @ x[:, t].T + own["weight_hh_l0"] @ hidden.T
            said = said.T + own["bias_ih_l0"] + own["bias_hh_l0"]
            enter, forget, candidate, leave = said.unflatten(1, (4, wide)).unbind(1)
            cell = cell * forget.sigmoid() + enter.sigmoid() * candidate.tanh()
            hidden = leave.sigmoid() * cell.tanh()
            rows.append(hidden)
        assert far(mixer(x)[0], mixer.out(torch.stack(rows, dim=1))) < 1e-5
        # One token by hand is one token of torch's own.
        _, state = mixer(x[:, :5], mixer.start(2, LENGTH))
        y, state = mixer.step(x[:, 5], state)
        assert far(y, mixer.out(rows[5])) < 1e-5
        assert far(mixer(x[:, 6:], state)[0], mixer.out(torch.stack(rows[6:], dim=1))) < 1e-5


@pytest.mark.parametrize("forget", [1.0, 0.0, 3.0])
def test_lstm_starts_with_its_forget_gate_where_it_was_asked(small: Frame, forget: float) -> None:
    mixer = LSTM(forget=forget).build(small)
    assert isinstance(mixer, LSTMMixer)
    bias = mixer.weights()["bias_ih_l0"] + mixer.weights()["bias_hh_l0"]
    assert bias.unflatten(0, (4, 64)).mean(1).tolist() == [0, forget, 0, 0]


def test_lstm_keeps_its_cell_wide_whatever_the_weights_are(small: Frame) -> None:
    mixer = LSTM().build(small).bfloat16()
    x = x_of().bfloat16()
    y, state = mixer(x, mixer.start(2, LENGTH))
    assert y.dtype == torch.bfloat16 and state.cell.dtype == state.hidden.dtype == torch.float32
    wide = LSTM().build(small)
    wide.load_state_dict(mixer.state_dict())
    _, exact = wide(x.float(), wide.start(2, LENGTH))
    torch.testing.assert_close(state.cell, exact.cell, rtol=1e-5, atol=1e-6)
    assert not torch.equal(state.cell, state.cell.bfloat16().float())


def test_what_walks_its_tokens_says_so_and_pays_in_steps_that_wait() -> None:
    frame = Frame(width=64, context=300)
    for spec in (LSTM(), LSTM(ratio=0.5), Clockwork(), SRU(peephole=True)):
        assert spec.sequential and spec.cost(frame).serial_steps == 300
    for spec in (SRU(), MinGRU(), RGLRU(), Mamba()):
        assert not spec.sequential and spec.cost(frame).serial_steps == 0


def test_prices_by_hand() -> None:
    frame = Frame(width=2048, context=5, batch=3)
    sru = SRU(expand=1.5, peephole=True).cost(frame)
    assert sru.params == 2048 * 3072 * 5 + 4 * 3072
    assert sru.flops_decode == sru.flops_prefill == 2 * 5 * 2048 * 3072 + 20 * 3072
    assert sru.stored_bytes == 3 * 3072 * 4
    assert SRU().cost(frame).flops_decode == 6 * 2048 * 2048 + 20 * 2048
    assert SRU().cost(frame).params == 3 * 2048 * 2048 + 2 * 2048
    assert MinGRU(expand=2.0).cost(frame).params == 3 * 2048 * 4096
    assert MinGRU(expand=2.0).cost(frame).stored_bytes == 3 * 4096 * 4
    lstm = LSTM(ratio=0.5).cost(frame)
    assert lstm.params == sum(w.numel() for w in nn.LSTM(2048, 1024).parameters()) + 1024 * 2048
    assert lstm.stored_bytes == 3 * 2 * 1024 * 4
    assert lstm.flops_decode == 2 * (4 * 1024 * 3072 + 1024 * 2048) + 9 * 1024
    mamba = Mamba().cost(frame)
    weights = 3 * 2048 * 4096 + 4096 * (128 + 32) + 128 * 4096
    assert mamba.flops_decode == 2 * (weights + 4 * 4096) + 9 * 4096 * 16
    assert {tensor.name: tensor.stored_bytes for tensor in mamba.cache} == {
        "matrix": 3 * 4096 * 16 * 4,
        "tail": 3 * 4096 * 3 * 2,
    }
    rglru = RGLRU().cost(Frame(width=2560))
    assert rglru.flops_decode == 2 * (3 * 2560 * 2560 + 2 * 2560 * 256 + 4 * 2560) + 9 * 2560
    assert {tensor.name: tensor.stored_bytes for tensor in rglru.cache} == {
        "hidden": 2560 * 4,
        "tail": 2560 * 3 * 2,
    }


def test_mamba_has_its_published_parameters() -> None:
    """mamba-2.8b: 64 layers of width 2560 with a norm each, 50,280 tied embeddings, a final norm."""
    cost = Mamba().cost(Frame(width=2560))
    assert 64 * (cost.params + 2560) + 50280 * 2560 + 2560 == 2_768_345_600


@pytest.mark.parametrize(("width", "heads"), [(2560, 10), (4096, 16), (2304, 9), (2048, 8)])
def test_rglru_has_its_published_heads(width: int, heads: int) -> None:
    spec = RGLRU().sized(Frame(width=width))
    assert (spec.heads, spec.head_dim) == (heads, 256)
    griffin = RGLRU(heads=22).sized(Frame(width=4096))
    assert griffin.heads == 22 and griffin.head_dim == 256


def test_what_is_wider_than_the_model_stays_so_when_it_shrinks() -> None:
    target, proxy = Frame(width=4096), Frame(width=64, train_length=64)
    small = shrink(RGLRU(heads=24, head_dim=256), target, proxy)
    assert small.heads is not None and small.head_dim is not None
    assert small.heads * small.head_dim == 96
    assert shrink(Mamba(rank=512), target, proxy).rank == 8
    assert shrink(Mamba(state=32), target, proxy).state == 8
    assert shrink(LSTM(ratio=2.0), target, proxy) == LSTM(ratio=2.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (SRU(), SRU(activation="tanh")),
        (SRU(), SRU(highway=-3)),
        (MinGRU(), MinGRU(candidate="linear")),
        (LSTM(), LSTM(forget=3.0)),
        (Clockwork(), Clockwork(base=4)),
        (Clockwork(), Clockwork(modules=2)),
        (RGLRU(head_dim=16), RGLRU(head_dim=32)),
        (Mamba(), Mamba(norms=True)),
        (Mamba(), Mamba(taps=2)),
    ],
    ids=str,
)
def test_every_setting_says_something(one: MixerSpec, other: MixerSpec, small: Frame, far: Far) -> None:
    x, outputs = x_of(), []
    for spec in (one, other):
        torch.manual_seed(3)
        outputs.append(spec.build(small)(x)[0])
    assert far(outputs[0], outputs[1]) > 1e-2
