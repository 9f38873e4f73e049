"""Mixture of sparse attention: written out, special cases, its share of the tokens, its price."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from search_space.frame import Frame
from search_space.mixers.full import Full
from search_space.mixers.mosa import MoSA, MoSAMixer
from search_space.positions import Positions, Scaling
from search_space.spec import Mixer, Stream
from search_space.state import state_bytes

Far = Callable[[Tensor, Tensor], float]
LENGTH = 70


def x_of(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, 64)


@torch.no_grad()
def steps(mixer: Mixer, x: Tensor, state: Any) -> Tensor:
    rows = []
    for t in range(x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        rows.append(y)
    return torch.stack(rows, dim=1)


def by_hand(mixer: MoSAMixer, x: Tensor) -> Tensor:
    """One query and one head after another; the first group takes all."""
    q, k, v = (layer(x).unflatten(-1, (-1, 16)) for layer in (mixer.query, mixer.key, mixer.value))
    positions = Positions(kind="rope", fraction=mixer.spec.rotary, base=1e4, scaling=Scaling())
    q, k = positions.turn(q, 0), positions.turn(k, 0)
    scores, shared = mixer.router(x).sigmoid(), mixer.heads // mixer.kv_heads
    output = torch.zeros_like(q)
    for b in range(x.shape[0]):
        for h in range(mixer.heads):
            g = h // shared
            taken = [t for t in range(x.shape[1]) if g == 0 or scores[b, t, g] > 0.5]
            for place, t in enumerate(taken):
                seen = taken[: place + 1][-mixer.size :]
                weights = (k[b, seen, g] @ q[b, t, h] / 4).softmax(0)
                output[b, t, h] = scores[b, t, g] * (weights @ v[b, seen, g])
    return mixer.out(output.flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("sparsity", "size"), [(2, 8), (4, 8), (4, 80), (16, 4)])
def test_written_out(small: Frame, far: Far, kv_heads: int, sparsity: int, size: int) -> None:
    mixer, x = MoSA(sparsity=sparsity, size=size, kv_heads=kv_heads).build(small), 2 * x_of()
    assert isinstance(mixer, MoSAMixer)
    wanted = by_hand(mixer, x)
    assert far(mixer(x)[0], wanted) < 1e-5
    assert far(steps(mixer, x, mixer.start(2, LENGTH)), wanted) < 1e-5
    _, taken = mixer.route(x)
    assert taken[..., 0].all() and 0 < taken[..., 1:].float().mean() < 0.7


@torch.no_grad()
def test_all_tokens_taken_is_full_attention_times_the_score(small: Frame, far: Far) -> None:
    full, mixer = Full(kv_heads=2).build(small), MoSA(sparsity=1, size=LENGTH + 2, kv_heads=2).build(small)
    mixer.load_state_dict(full.state_dict(), strict=False)
    inside: list[Tensor] = []
    full.out.register_forward_pre_hook(lambda _, given: inside.append(given[0]))
    x = x_of()
    full(x)
    scores = mixer.router(x).sigmoid().repeat_interleave(32, dim=-1)
    wanted = mixer.out(inside[0] * scores)
    assert far(mixer(x)[0], wanted) < 1e-5
    assert far(steps(mixer, x, mixer.start(2, LENGTH)), wanted) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("sparsity", "size"), [(2, 8), (4, 80)])
def test_no_future_and_any_cut(small: Frame, far: Far, sparsity: int, size: int) -> None:
    mixer, x = MoSA(sparsity=sparsity, size=size).build(small), 3 * x_of(2, 40)
    whole, _ = mixer(x)
    for t in range(39):
        for future in (100.0 * torch.randn(2, 39 - t, 64), torch.full((), torch.nan)):
            changed = x.clone()
            changed[:, t + 1 :] = future
            assert far(mixer(changed)[0][:, : t + 1], whole[:, : t + 1]) < 1e-5
        first, state = mixer(x[:, : t + 1], mixer.start(2, 40))
        assert far(torch.cat([first, mixer(x[:, t + 1 :], state)[0]], 1), whole) < 1e-4
        again, state = mixer(x[:, : t + 1], mixer.start(2, 40))
        assert far(torch.cat([again, steps(mixer, x[:, t + 1 :], state)], 1), whole) < 1e-4


@pytest.mark.parametrize("bias", [3.0, -3.0])
def test_the_loss_holds_the_share(small: Frame, bias: float) -> None:
    mixer, x = MoSA(sparsity=4, balance=0.1).build(small), x_of(4)
    assert isinstance(mixer, MoSAMixer)
    assert mixer.eval().forward_with(x, None, Stream())[2].losses == ()
    mixer.train()
    torch.nn.init.constant_(mixer.router.bias, bias)
    optimiser = torch.optim.Adam(mixer.router.parameters(), lr=0.05)
    values = []
    for _ in range(150):
        (loss,) = mixer.forward_with(x, None, Stream())[2].losses
        share = mixer.route(x)[1][..., 1:].float().mean((0, 1))
        assert loss.item() == pytest.approx(0.1 * (4 * share - 1).square().mean().item(), abs=1e-5)
        values.append(share.mean().item())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert values[0] > 0.9 if bias > 0 else values[0] < 0.05
    assert 0.15 < values[-1] < 0.35


@torch.no_grad()
@pytest.mark.parametrize("sparsity", [2, 4, 16])
def test_a_fresh_router_takes_its_share(sparsity: int) -> None:
    mixer = MoSA(sparsity=sparsity, heads=16, head_dim=8).build(Frame(width=256, train_length=64))
    assert isinstance(mixer, MoSAMixer)
    share = mixer.route(torch.randn(2, 500, 256))[1][..., 1:].float().mean().item()
    assert 0.75 / sparsity < share < 1.3 / sparsity


def test_mosa_by_hand(small: Frame) -> None:
    """Width 2048, 16 heads of 128, 512 kept: 8 KiB a token that is kept, and a count for each group."""
    cost = MoSA(size=512).cost(Frame(width=2048, context=131072))
    assert cost.params == 4 * 2048**2 + 16 * 2049
    assert cost.stored_bytes == cost.read_bytes == 8192 * 512 + 16 * 8
    assert cost.flops_decode == 2 * (4 * 2048**2 + 16 * 2048) + 4 * 2048 * 512
    for context in (1, 7, 90):
        frame = replace(small, context=context)
        assert (
            state_bytes(MoSA().build(frame).start(3, context))
            == MoSA().cost(replace(frame, batch=3)).stored_bytes
        )
