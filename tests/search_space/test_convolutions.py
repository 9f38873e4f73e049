"""Hyena, its distillation, and the gated short convolution: formulas written out, an oracle, prices by hand."""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from search_space.distil import distil, distil_hyena, hankel_values
from search_space.filters import ImplicitFilters, ModalFilters
from search_space.frame import Frame
from search_space.mixers.hyena import Hyena, HyenaMixer
from search_space.mixers.shortconv import ShortConv, ShortConvMixer
from search_space.modes import SLOW
from search_space.spec import Mixer

Far = Callable[[Tensor, Tensor], float]
LENGTH = 70


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def x_of(length: int = LENGTH) -> Tensor:
    return torch.randn(2, length, 64)


def stepped(mixer: Mixer, x: Tensor) -> Tensor:
    state, rows = mixer.start(x.shape[0], x.shape[1]), []
    for t in range(x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        rows.append(y)
    return torch.stack(rows, dim=1)


def implicit_taps(filters: ImplicitFilters, length: int, longest: int) -> Tensor:
    """The filters [O, D, L] from the paper's formulas, one tap at a time."""
    convolutions, channels = len(filters.widths), filters.channels
    first, last = math.log(0.01) / 1.5, math.log(0.01) / 0.3
    falls = [abs(first + (last - first) * c / (channels - 1)) for c in range(channels)]
    rows = []
    for t in range(length):
        share = t / (longest - 1)
        bands = [1e-4 + (15 - 1e-4) * k / 15 for k in range(16)]
        angles = [2 * math.pi * t / longest * band for band in bands]
        y = torch.tensor(
            [share, *map(math.cos, angles), *(-math.sin(a) for a in angles)], dtype=torch.float64
        )
        for layer in filters.layers:
            y = torch.sin(filters.frequency * (layer.weight @ y + layer.bias))
        # The window of unit energy: its squares, summed over all lags, are about one.
        window = [math.sqrt(2 * fall / longest) * math.exp(-share * fall) for fall in falls]
        rows.append(
            (filters.out.weight @ y).view(convolutions, channels) * torch.tensor(window, dtype=torch.float64)
        )
    return torch.stack(rows, dim=-1)


def modal_taps(filters: ModalFilters, length: int) -> Tensor:
    """[O, D, L]: twice the real part of a sum of powers."""
    decay = (filters.rate * SLOW).exp()
    pole = (-decay).exp() * torch.polar(torch.ones_like(decay), filters.angle * SLOW)
    residue = torch.complex(filters.residue[..., 0], filters.residue[..., 1]) * (1 - pole.abs() ** 2).sqrt()
    return torch.stack([2 * (residue * pole**t).sum(-1).real for t in range(length)], dim=-1)


def written_out(mixer: HyenaMixer, taps: Tensor, x: Tensor) -> Tensor:
    """Projections, a convolution over three tokens, then direct double sums with gates between them."""
    width = x.shape[-1]
    entered = mixer.enter(x)
    mixed = torch.zeros_like(entered) + mixer.taps_bias
    for back in range(3):
        mixed[:, back:] += mixer.taps[:, 2 - back] * entered[:, : x.shape[1] - back]
    last, rest = mixed[..., :width], mixed[..., width:]
    shared = rest.shape[-1] // (taps.shape[0] + 1)
    # A group of neighbours reads one channel.
    gates = [part.repeat_interleave(width // shared, dim=-1) for part in rest.split(shared, dim=-1)]
    v = gates.pop()
    for gate, filters, skip in zip(gates, taps, mixer.skip, strict=True):
        w, v = v * gate, torch.zeros_like(v)
        for t in range(x.shape[1]):
            for s in range(t + 1):
                v[:, t] += filters[:, t - s] * w[:, s]
        v += skip * w
    return mixer.out(last * v)


@pytest.mark.parametrize(("order", "groups"), [(2, 1), (3, 1), (2, 4), (3, 2)])
@pytest.mark.parametrize("kind", ["implicit", "modal"])
def test_hyena_is_its_direct_sums_in_float64(
    small: Frame, kind: str, order: int, groups: int, far: Far, shake: Callable[[nn.Module], None]
) -> None:
    spec = Hyena(filter=kind, order=order, groups=groups, modes=4, hidden=32, omega=10)
    mixer = spec.build(small).double()
    assert isinstance(mixer, HyenaMixer)
    shake(mixer)
    if isinstance(mixer.filters, ImplicitFilters):
        assert mixer.filters.frequency.min() > 8
        taps = implicit_taps(mixer.filters, LENGTH, small.longest)
    else:
        assert isinstance(mixer.filters, ModalFilters)
        taps = modal_taps(mixer.filters, LENGTH)
    assert taps.shape == (order - 1, 64, LENGTH)
    x = x_of().double()
    assert far(mixer(x)[0], written_out(mixer, taps, x)) < 1e-10
    # The first convolution's filters are not the second's.
    assert order == 2 or far(written_out(mixer, taps.flip(0), x), mixer(x)[0]) > 1e-3


@pytest.mark.parametrize("order", [2, 3])
def test_shared_projections_are_repeated_ones(small: Frame, order: int, far: Far) -> None:
    shared = Hyena(order=order, groups=4).build(small)
    whole = Hyena(order=order).build(small)
    weights = dict(shared.state_dict())
    for name in ("enter.weight", "enter.bias", "taps", "taps_bias"):
        parts = weights[name].split([64] + [16] * order)
        weights[name] = torch.cat([parts[0], *(part.repeat_interleave(4, dim=0) for part in parts[1:])])
    whole.load_state_dict(weights)
    x = x_of()
    assert far(shared(x)[0], whole(x)[0]) < 1e-5
    assert far(stepped(shared, x), stepped(whole, x)) < 1e-5


def test_the_longest_text_is_a_part_of_an_implicit_filter(small: Frame, far: Far) -> None:
    one = Hyena().build(small)
    x = x_of(20)
    for frame, same in (
        (replace(small, train_length=16, context=96), True),
        (replace(small, train_length=96, context=4), True),
        (replace(small, max_length=512), False),
        (replace(small, context=200), False),
    ):
        other = Hyena().build(frame)
        other.load_state_dict(one.state_dict())
        assert (far(other(x)[0], one(x)[0]) < 1e-6) == same, frame
    with pytest.raises(ValueError, match=r"97 tokens do not fit a filter of 96.*larger max_length"):
        one(x_of(97))
    modal = Hyena(filter="modal").build(small)
    assert modal(x_of(97))[0].isfinite().all()
    assert Hyena.needs == {"length"}


@pytest.mark.parametrize("longest", [16, 256, 4096])
def test_filters_have_the_same_energy_at_any_length(longest: int) -> None:
    """Without it outputs would be sixteen times larger at the last length than at the first."""
    filters = ImplicitFilters([64], 64, hidden=64, omega=14, longest=longest, dtype=torch.float32)
    energy = filters.taps(0, longest).square().sum(-1).mean()
    assert 0.05 < energy < 0.5
    modal = ModalFilters([64], 64, modes=8)
    assert 0.5 < torch.as_tensor(modal_taps(modal, 4000)).square().sum(-1).mean() < 2


def test_steps_read_one_table_that_follows_the_weights(
    small: Frame, far: Far, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer, other = Hyena(order=3).build(small), Hyena(order=3).build(small)
    x, calls = x_of(12), []
    make = ImplicitFilters.taps
    monkeypatch.setattr(
        ImplicitFilters, "taps", lambda self, begin, end: (calls.append(end), make(self, begin, end))[1]
    )
    before = stepped(mixer, x)
    assert calls == [96]
    mixer.load_state_dict(other.state_dict())
    after = stepped(mixer, x)
    assert calls == [96, 96]
    assert far(after, mixer(x)[0]) < 1e-4
    assert far(after, before) > 1e-2


def test_a_table_in_blocks_is_the_same(small: Frame, far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = Hyena().build(small), x_of(30)
    monkeypatch.setattr("search_space.filters.BLOCK", 7)
    assert far(stepped(mixer, x), mixer(x)[0]) < 1e-4


def test_hyenas_prices_by_hand() -> None:
    frame = Frame(width=4096, context=8192, batch=3)

    def cost(**settings: int | str):
        return Hyena(**settings).cost(frame)

    # Keys, values and inputs of bfloat16, and the last two inputs of the short convolution.
    assert [t.stored_bytes for t in cost().cache] == [3 * 8192 * 4096 * 2, 3 * 2 * 3 * 4096 * 2]
    assert [t.stored_bytes for t in cost(order=3).cache] == [3 * 2 * 8192 * 4096 * 2, 3 * 2 * 4 * 4096 * 2]
    # What a group shares is kept once; what the first convolution gives is each channel's own.
    assert cost(order=3, groups=4).cache[0].stored_bytes == 3 * 8192 * (1024 + 4096) * 2
    network = 34 * 64 + 2 * 65 * 64 + 64 + 64 * 4096
    projections = 4096 * 3 * 4096 + 3 * 4096 + 4096 * 4096 + 4096
    assert cost().params == projections + 4 * 3 * 4096 + 4096 + network
    assert cost().flops_decode == 2 * 4 * 4096**2 + 6 * 3 * 4096 + 6 * 4096 + 2 * 8192 * 4096
    made = 2 * 64 * (33 + 2 * 64 + 4096)
    every = 2 * 4 * 4096**2 + 6 * 3 * 4096 + 6 * 4096
    assert cost().flops_prefill == every + 4096 * 30 * math.log2(16384) + made / 3
    assert cost(filter="modal", modes=2).flops_decode == every + 14 * 2 * 4096
    assert cost(filter="modal", modes=2).params - cost(filter="modal", modes=4).params == -4 * 2 * 4096


def test_stripedhyena_and_evo_keep_what_is_published() -> None:
    frame = Frame(width=4096, context=131072)
    striped = Hyena(filter="modal", modes=2, groups=4)
    modes, tail = striped.cost(frame).cache
    assert 16 * modes.stored_bytes == 16 * 4096 * 2 * 8
    assert tail.stored_bytes == 2 * (4096 + 2 * 1024) * 2
    assert Hyena(filter="modal", modes=8).cost(frame).cache[1].stored_bytes == 2 * 12288 * 2
    assert striped.cost(replace(frame, context=1)).stored_bytes == modes.stored_bytes + tail.stored_bytes


def test_settings_of_the_other_filter_say_nothing() -> None:
    frame = Frame(width=64)
    assert Hyena(modes=32).sized(frame) == Hyena().sized(frame)
    modal = Hyena(filter="modal", hidden=32, omega=1, modes=2)
    assert modal.sized(frame) == Hyena(filter="modal", modes=2)
    assert Hyena(hidden=32).sized(frame) != Hyena().sized(frame)


def curve(length: int) -> Tensor:
    """Filters of six modes, two of which are real and one negative."""
    t = torch.arange(length).double()
    first = 0.97**t * (0.3 * t).cos() + 0.5 * 0.8**t - 0.4 * (-0.6) ** t + 0.2 * 0.9**t * (2 * t).sin()
    second = 0.99**t * (0.1 * t).sin() - 0.95**t * (1.3 * t).cos()
    return torch.stack([first, second])


def test_a_filter_of_few_modes_is_found_again() -> None:
    filters = curve(120)
    filters[:, 0] += 3
    assert (hankel_values(filters)[0, 6:] < 1e-10).all() and hankel_values(filters)[0, 5] > 1e-3
    assert (hankel_values(filters)[1, 4:] < 1e-10).all()
    # Four numbers: two pairs; two pairs and two real ones.
    for modes, exact in ((4, [0, 1]), (2, [1])):
        found = distil(filters, modes)
        assert found.log_pole.shape == found.residue.shape == (2, modes)
        assert (found.log_pole.real <= 0).all()
        error = (found.taps(120) - filters).abs().amax(1)
        assert (error[exact] < 1e-9).all()
    nothing = distil(torch.zeros(1, 9), 2)
    assert (nothing.taps(9) == 0).all()
    assert distil(filters[:, :5], 8).taps(5).isfinite().all()
    torch.testing.assert_close(distil(filters, 4).direct, torch.tensor([3.0, 3.0], dtype=torch.float64))


def test_errors_fall_with_the_modes_and_stay_near_the_next_hankel_value(small: Frame) -> None:
    mixer = Hyena(omega=1).build(replace(small, context=160))
    assert isinstance(mixer, HyenaMixer) and isinstance(mixer.filters, ImplicitFilters)
    filters = mixer.filters.taps(0, 160)[0].double()
    values, before = hankel_values(filters), math.inf
    for modes in (1, 2, 4, 8, 16):
        error = distil(filters, modes).taps(160) - filters
        relative = (error.square().sum() / filters.square().sum()).sqrt().item()
        assert relative < 0.9 * before
        before = relative
        norms = hankel_values(error)[:, 0]
        # No recurrence of so many real numbers does better, and this one is within a few times of the best.
        assert (norms >= 0.999 * values[:, 2 * modes]).all()
        assert (norms / values[:, 2 * modes]).median() < 4
    assert before < 0.02


@pytest.mark.parametrize(("order", "groups"), [(2, 1), (3, 4)])
def test_a_distilled_mixer_is_near_the_first_one(small: Frame, order: int, groups: int) -> None:
    mixer = Hyena(order=order, groups=groups, omega=1).build(small)
    assert isinstance(mixer, HyenaMixer)
    # Filters as they weigh after training: the shares that pass by them do not hide an error.
    mixer.skip.mul_(0.1)
    x, errors = x_of(96), []
    wanted = mixer(x)[0] - mixer.out.bias
    for modes in (2, 8, 32):
        made = distil_hyena(mixer, modes, length=96)
        y = stepped(made, x) - made.out.bias
        errors.append(((y - wanted).square().mean() / wanted.square().mean()).sqrt().item())
        assert isinstance(made.filters, ModalFilters)
    assert errors[0] > 3 * errors[1] and errors[1] > errors[2]
    assert errors[1] < 0.02
    assert mixer.filters is not made.filters
    with pytest.raises(ValueError, match="this one's filters are modal"):
        distil_hyena(made, 8, length=96)
    with pytest.raises(ValueError, match="at least one mode"):
        distil(torch.randn(2, 9), 0)
    with pytest.raises(ValueError, match="five taps"):
        distil(torch.randn(2, 4), 4)


@pytest.mark.parametrize("taps", [3, 4])
def test_a_short_convolution_is_lfm2s(taps: int, far: Far) -> None:
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.models.lfm2.configuration_lfm2 import Lfm2Config
        from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

        config = Lfm2Config(
            hidden_size=64, conv_L_cache=taps, conv_bias=False, num_hidden_layers=1, layer_types=["conv"]
        )
        theirs = Lfm2ShortConv(config, 0).eval()
    ours = ShortConv(taps=taps).build(Frame(width=64, dtype="float32"))
    assert isinstance(ours, ShortConvMixer)
    ours.enter.weight.copy_(theirs.in_proj.weight)
    ours.taps.copy_(theirs.conv.weight[:, 0])
    ours.out.weight.copy_(theirs.out_proj.weight)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    x = x_of()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = theirs(x)
    assert far(ours(x)[0], wanted) < 1e-5
    assert far(stepped(ours, x), wanted) < 1e-5


def test_a_short_convolution_sees_its_taps_and_no_more() -> None:
    for taps in (3, 4):
        mixer = ShortConv(taps=taps).build(Frame(width=64, dtype="float32"))
        x = x_of()
        y, _ = mixer(x)
        for back in range(6):
            changed = x.clone()
            changed[:, 40 - back] += 1
            assert ((mixer(changed)[0][:, 40] - y[:, 40]).abs().max() > 1e-5) == (back < taps)


def test_lfm2s_price_by_hand() -> None:
    cost = ShortConv().cost(Frame(width=2048, context=32768, batch=2))
    assert cost.params == 2048 * 6144 + 2048 * 3 + 2048 * 2048
    assert cost.stored_bytes == cost.read_bytes == 2 * 2 * 2048 * 2
    assert cost.flops_decode == cost.flops_prefill == 2 * 4 * 2048**2 + 6 * 2048 + 2 * 2048
    assert ShortConv(taps=4).cost(Frame(width=2048, dtype="float32")).stored_bytes == 3 * 2048 * 4
