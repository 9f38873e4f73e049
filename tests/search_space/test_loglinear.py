"""Log-linear attention: its bases where all levels weigh alike, its levels, and its price by hand."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from search_space.frame import Frame
from search_space.mixers.loglinear import LogLinear, LogLinearMixer, levels_for
from search_space.mixers.mamba2 import Mamba2, Mamba2Mixer
from search_space.spec import shrink
from search_space.state import state_bytes

Far = Callable[[Tensor, Tensor], float]
FRAME = Frame(width=64, train_length=128, context=128, dtype="float32")
LENGTH = 75
BASES = ("mamba2", "gated_delta")


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def made(**settings: Any) -> LogLinearMixer:
    mixer = LogLinear(**settings).build(FRAME)
    assert isinstance(mixer, LogLinearMixer)
    return mixer.eval()


def tokens(length: int = LENGTH) -> Tensor:
    """Their first channel is always one."""
    x = torch.randn(2, length, 64)
    x[..., 0] = 1.0
    return x


def weigh_all_alike(mixer: LogLinearMixer) -> None:
    """Every weight of every level is one, given that the first channel is: softplus(log(e - 1)) = 1."""
    rows = mixer.enter.weight[-mixer.heads * mixer.levels :]
    rows.zero_()
    rows[:, 0] = math.log(math.e - 1)


def same_both_ways(mixer: LogLinearMixer, wanted: Tensor, x: Tensor, far: Far) -> None:
    assert far(mixer(x)[0], wanted) < 1e-5
    state, rows = mixer.start(x.shape[0], LENGTH), []
    for t in range(x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        rows.append(y)
    assert far(torch.stack(rows, dim=1), wanted) < 1e-5


def test_with_equal_weights_it_is_mamba2(far: Far) -> None:
    ours = made(state=16, heads=4, head_dim=32)
    weigh_all_alike(ours)
    base = Mamba2(state=16, heads=4, head_dim=32).build(FRAME)
    assert isinstance(base, Mamba2Mixer)
    # Ours: gate, values, keys and queries, steps, weights. Theirs end before the weights and name keys first.
    gate, values, query, key, step, _ = ours.enter.weight.split([128, 128, 16, 16, 4, 4 * ours.levels])
    base.enter.weight.copy_(torch.cat([gate, values, key, query, step]))
    values, query, key = ours.taps.split([128, 16, 16])
    base.taps.copy_(torch.cat([values, key, query]))
    base.taps_bias.zero_()
    for name in ("log_rate", "step_bias", "skip", "norm_weight"):
        getattr(ours, name).add_(0.2 * torch.randn_like(getattr(ours, name)))
        getattr(base, name).copy_(getattr(ours, name))
    base.out.weight.copy_(ours.out.weight)
    x = tokens()
    same_both_ways(ours, base(x)[0], x, far)


@pytest.mark.filterwarnings("ignore")
def test_with_equal_weights_it_is_qwen3_nexts_gated_delta_rule(far: Far) -> None:
    pytest.importorskip("transformers")
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs_module

    config = theirs_module.Qwen3NextConfig(
        hidden_size=64,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=24,
        linear_conv_kernel_dim=4,
        num_hidden_layers=1,
    )
    theirs = theirs_module.Qwen3NextGatedDeltaNet(config, 0).eval()
    for weight in theirs.parameters():
        weight.normal_(std=0.2)
    theirs.A_log.uniform_(-3, 0)
    theirs.norm.weight.add_(1)
    ours = made(base="gated_delta", state=16, heads=4, head_dim=24)
    # Theirs goes head by head: query, key, value, gate; and write strength, step.
    query, key, value, gate = theirs.in_proj_qkvz.weight.view(4, 80, 64).split([16, 16, 24, 24], dim=1)
    strength, step = theirs.in_proj_ba.weight.view(4, 2, 64).unbind(1)
    weights = torch.zeros(4 * ours.levels, 64)
    parts = [part.flatten(0, 1) for part in (gate, value, query, key)]
    ours.enter.weight.copy_(torch.cat([*parts, step, strength, weights]))
    weigh_all_alike(ours)
    query, key, value = theirs.conv1d.weight[:, 0].split([64, 64, 96])
    ours.taps.copy_(torch.cat([value, query, key]))
    ours.log_rate.copy_(theirs.A_log)
    ours.step_bias.copy_(theirs.dt_bias)
    ours.norm_weight.copy_(theirs.norm.weight)
    ours.out.weight.copy_(theirs.out_proj.weight)
    x = tokens()
    same_both_ways(ours, theirs(x), x, far)


@pytest.mark.parametrize("base", BASES)
def test_a_level_is_weighed_by_itself(base: str) -> None:
    """What token 8 reads of level 4, tokens 0 to 7, changes with that level's weight; what token 7 reads does not."""
    mixer, x = made(base=base), tokens(9)
    before = mixer(x)[0]
    mixer.level_gain[:, 4] += 3.0
    after = mixer(x)[0]
    torch.testing.assert_close(after[:, :8], before[:, :8], rtol=1e-5, atol=1e-6)
    assert (after[:, 8] - before[:, 8]).abs().max() > 1e-3


@pytest.mark.parametrize("base", BASES)
def test_cut_at_every_place(base: str, far: Far) -> None:
    mixer, x = made(base=base), tokens(71)
    whole, _ = mixer(x)
    for place in range(1, 71):
        first, state = mixer(x[:, :place], mixer.start(2, 71))
        assert state.length == place
        rest, _ = mixer(x[:, place:], state)
        assert far(torch.cat([first, rest], dim=1), whole) < 1e-5


@pytest.mark.parametrize("base", BASES)
def test_text_beyond_the_longest_is_read_as_very_old(base: str, far: Far) -> None:
    """The last level takes what is older than all levels can tell apart; prefill and steps agree on it."""
    frame = replace(FRAME, train_length=8, context=8)
    mixer = LogLinear(base=base).build(frame)
    x = tokens(40)
    whole, _ = mixer(x)
    _, state = mixer(x[:, :13], mixer.start(2, 8))
    for t in range(13, 40):
        y, state = mixer.step(x[:, t], state)
        assert far(y, whole[:, t]) < 1e-5


def test_levels_follow_the_longest_text() -> None:
    for longest, levels in ((1, 2), (2, 2), (3, 3), (64, 7), (65, 8), (32768, 16), (131072, 18)):
        assert levels_for(longest) == levels
    frame = Frame(width=64, train_length=64, context=10, max_length=1000, dtype="float32")
    assert LogLinear().build(frame).start(1, 1).matrix.shape[2] == 11
    assert "length" in LogLinear.needs


def test_price_by_hand() -> None:
    """Width 2048 at 16,384 tokens: 64 heads of 64 values, 128 states; 15 levels of 2 MiB, all live at the end."""
    frame = Frame(width=2048, train_length=4096, context=16384, batch=2)
    cost = LogLinear().cost(frame)
    weights = 2048 * (2 * 4096 + 2 * 128 + 64 + 64 * 15) + 4096 * 2048
    others = 4 * (4096 + 256) + 64 * 15 + 3 * 64 + 4096
    assert cost.params == weights + others
    by_name = {tensor.name: tensor for tensor in cost.cache}
    assert by_name["matrix"].stored_bytes == 2 * 15 * 64 * 64 * 128 * 4
    assert by_name["matrix"].read_bytes == 2 * 15 * 64 * 64 * 128 * 4
    assert by_name["tail"].stored_bytes == 2 * 3 * (4096 + 256) * 2
    dense = 2 * (weights + 4 * (4096 + 256))
    assert cost.flops_decode == dense + (14 * 3 + 5) * 64 * 64 * 128
    assert cost.flops_prefill == dense + 64 * (2 * 64 * (128 + 64) + 4 * 64 * 128 * (1 + 8))
    # 10,001 tokens: 10,000 is 10011100010000 in binary, five ones and level 0.
    part = LogLinear().cost(replace(frame, context=10001, max_length=16384)).cache[0]
    assert (part.stored_bytes, part.read_bytes) == (2 * 15 * 2**21, 2 * 6 * 2**21)
    delta = LogLinear(base="gated_delta").cost(frame)
    assert delta.params == 2048 * (5 * 2048 + 32 + 16 * 15) + 4 * 6144 + 16 * 15 + 32 + 128
    dense = 2 * (2048 * (5 * 2048 + 32 + 16 * 15) + 4 * 6144)
    assert delta.flops_decode == dense + (14 * 7 + 5) * 16 * 128 * 128


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("context", [1, 2, 3, 64, 65, 100, 127, 128])
def test_read_bytes_are_those_of_the_levels_that_hold_something(base: str, context: int) -> None:
    frame = replace(FRAME, context=context)
    mixer = LogLinear(base=base).build(frame)
    _, state = mixer(tokens(context), mixer.start(2, context))
    live = sum(bool(state.matrix[:, :, level].any()) for level in range(mixer.levels))
    cost = LogLinear(base=base).cost(replace(frame, batch=2))
    assert cost.cache[0].read_bytes * mixer.levels == cost.cache[0].stored_bytes * live
    assert cost.stored_bytes == state_bytes(state)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("width", [8, 16, 24, 32, 40, 48, 64, 80, 2304, 4096])
def test_defaults_fit_any_width(base: str, width: int) -> None:
    target = Frame(width=4096, train_length=4096, context=32768)
    proxy = Frame(width=width, train_length=64, context=64, dtype="float32")
    spec = LogLinear(base=base)
    assert spec.cost(proxy).params > 0
    assert shrink(spec, target, proxy).sized(proxy).base == base
    assert spec.sized(target).state == 128
