"""Mixers that walk a text in segments: written out token by token, their borders, gradients, reads and prices."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_space.frame import Frame
from search_space.mixers.full import Full, FullMixer
from search_space.mixers.infini import Infini, InfiniMixer
from search_space.mixers.transformer_xl import TransformerXL, TransformerXLMixer
from search_space.segments import mean_seen, seen_at
from search_space.vocabulary import mixer_of, read

Far = Callable[[Tensor, Tensor], float]
Shake = Callable[[nn.Module], None]
LENGTH = 75


def x_of(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, 64)


def xl(frame: Frame, **settings: Any) -> TransformerXLMixer:
    mixer = TransformerXL(heads=2, head_dim=24, **settings).build(frame)
    assert isinstance(mixer, TransformerXLMixer)
    for bias in (mixer.attention.content_bias, mixer.attention.position_bias):
        nn.init.normal_(bias)
    return mixer.eval()


def sinusoid(distance: int) -> Tensor:
    angle = distance / 1e4 ** (torch.arange(0, 64, 2) / 64)
    return torch.cat([angle.sin(), angle.cos()])


def naive_relative(own: Any, x: Tensor, t: int, keys: list[tuple[int, Tensor]]) -> Tensor:
    """One token at x[:, t] over (distance, input) pairs, head by head: the paper's four terms."""
    heads = []
    for h in range(own.heads):
        rows = slice(h * own.head_dim, (h + 1) * own.head_dim)
        q = x[:, t] @ own.query.weight[rows].T
        scores = []
        for distance, seen in keys:
            k, r = seen @ own.key.weight[rows].T, own.position.weight[rows] @ sinusoid(distance)
            terms = (q * k).sum(-1) + q @ r + k @ own.content_bias[h] + own.position_bias[h] @ r
            scores.append(terms / own.head_dim**0.5)
        weights = torch.stack(scores, dim=1).softmax(1)
        values = torch.stack([seen @ own.value.weight[rows].T for _, seen in keys], dim=1)
        heads.append((weights[..., None] * values).sum(1))
    return torch.cat(heads, dim=-1) @ own.out.weight.T


@torch.no_grad()
@pytest.mark.parametrize(("segment", "memory"), [(8, 8), (8, 0), (12, 4), (4, 20), (16, 80)])
def test_transformer_xl_is_its_double_loop(small: Frame, segment: int, memory: int, far: Far) -> None:
    mixer, x = xl(small, segment=segment, memory=memory), x_of()
    y = mixer(x)[0]
    for t in (0, 3, 4, 7, 8, 23, 24, 47, 48, 74):
        first = max(0, t // segment * segment - memory)
        wanted = naive_relative(mixer.attention, x, t, [(t - s, x[:, s]) for s in range(first, t + 1)])
        assert far(y[:, t], wanted) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("segment", "memory"), [(8, 72), (76, 0), (28, 56)])
def test_a_memory_as_long_as_the_text_is_full_attention(
    small: Frame, segment: int, memory: int, far: Far
) -> None:
    mixer = xl(small, segment=segment, memory=memory)
    full = Full(heads=2, head_dim=24, rotary=0.0).build(small)
    assert isinstance(full, FullMixer)
    own = mixer.attention
    for weight in (own.content_bias, own.position_bias, own.position.weight):
        weight.zero_()
    for name in ("query", "key", "value", "out"):
        getattr(full, name).load_state_dict(getattr(own, name).state_dict())
    x = x_of()
    assert far(mixer(x)[0], full(x)[0]) < 1e-5


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_the_relative_scores_are_xlnets(small: Frame, far: Far) -> None:
    pytest.importorskip("transformers")
    from transformers.models.xlnet import configuration_xlnet, modeling_xlnet

    mixer, memory, segment = xl(small, segment=20, memory=12), 12, 20
    own = mixer.attention
    config = configuration_xlnet.XLNetConfig(d_model=48, n_head=2)
    theirs = modeling_xlnet.XLNetRelativeAttention(config).eval()
    theirs.r_w_bias.copy_(own.content_bias)
    theirs.r_r_bias.copy_(own.position_bias)
    x = x_of(length=40)
    q, (k, v) = own.heads_of(own.query, x[:, 20:]), own.keys_values(x[:, 8:])
    # Their table runs from the farthest distance to one segment into the future.
    table = torch.stack([sinusoid(32 - c) if c <= 32 else torch.zeros(64) for c in range(52)])
    r = own.heads_of(own.position, table)[:, None].expand(-1, 2, -1, -1)
    hidden = (~torch.ones(segment, memory + segment).tril(memory).bool()).float()[:, :, None, None]
    core = theirs.rel_attn_core(
        *(part.transpose(0, 1) for part in (q, k, v)), r, attn_mask=hidden.expand(-1, -1, 2, -1)
    )
    assert far(mixer(x)[0][:, 20:], own.out(core.transpose(0, 1).flatten(2))) < 1e-5


def test_no_gradient_flows_through_the_memory(small: Frame) -> None:
    mixer, x = xl(small, segment=8, memory=16), x_of().requires_grad_()
    mixer(x)[0][:, 44].sum().backward()
    assert x.grad is not None
    assert (x.grad[:, :40] == 0).all() and (x.grad[:, 40:45].abs().amax(-1) > 0).all()
    # The projections of keys and values learn from the memory too, as if its tokens were given.
    learnt = mixer.attention.key.weight.grad.clone()
    mixer.zero_grad()
    frozen = torch.cat([x[:, :40].detach(), x[:, 40:]], dim=1)
    read = naive_relative(mixer.attention, frozen, 44, [(44 - s, frozen[:, s]) for s in range(24, 45)])
    read.sum().backward()
    torch.testing.assert_close(mixer.attention.key.weight.grad, learnt, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 24, 25, 31, 75])
def test_a_step_of_transformer_xl_reads_what_it_is_priced_for(small: Frame, length: int) -> None:
    frame, x = replace(small, context=length, batch=2), x_of(length=length)
    spec = TransformerXL(heads=2, head_dim=24, segment=8, memory=16)
    mixer = spec.build(frame)
    _, state = mixer(x[:, :-1], mixer.start(2, length))
    copy = replace(state, keys=state.keys.clone(), values=state.values.clone())
    wanted, _ = mixer.step(x[:, -1], copy)
    seen = [s for s in range(length) if s >= (length - 1) // 8 * 8 - 16]
    slots = torch.tensor([s % state.keys.shape[1] for s in seen])
    for part in (state.keys, state.values):
        kept = part[:, slots].clone()
        part.fill_(torch.nan)
        part[:, slots] = kept
    assert torch.equal(mixer.step(x[:, -1], state)[0], wanted)
    for tensor in spec.cost(frame).cache:
        assert tensor.read_bytes == 2 * len(seen) * 48 * 4
        assert tensor.stored_bytes == 2 * min(length, 24) * 48 * 4


@pytest.mark.parametrize(("segment", "memory"), [(8, 8), (8, 0), (12, 4), (4, 20), (16, 80)])
def test_the_counts_of_what_is_seen(segment: int, memory: int) -> None:
    seen = [t + 1 - max(0, t // segment * segment - memory) for t in range(200)]
    assert [seen_at(t, segment, memory) for t in range(200)] == seen
    for context in (1, 3, 8, 17, 96, 200):
        assert mean_seen(context, segment, memory) == pytest.approx(sum(seen[:context]) / context)


def infini(frame: Frame, **settings: Any) -> InfiniMixer:
    mixer = Infini(**{"heads": 2, "head_dim": 24, **settings}).build(frame)
    assert isinstance(mixer, InfiniMixer)
    return mixer.eval()


@torch.no_grad()
@pytest.mark.parametrize("update", ["delta", "linear"])
@pytest.mark.parametrize("segment", [8, 24])
def test_infini_is_written_out(small: Frame, update: str, segment: int, far: Far, shake: Shake) -> None:
    mixer, x = infini(small, update=update, segment=segment, rotary=0.0), x_of()
    shake(mixer)
    q, k, v = (part.double() for part in mixer.project(x))
    sq, sk = F.elu(q) + 1, F.elu(k) + 1
    memory, norm = torch.zeros(2, 2, 24, 24).double(), torch.zeros(2, 2, 24).double()
    rows = []
    for t in range(LENGTH):
        begin = t // segment * segment
        if t == begin and t:
            before, total = memory.clone(), norm.clone()
            for s in range(begin - segment, begin):
                held = torch.einsum("bhk,bhkv->bhv", sk[:, s], before)
                held = held / (sk[:, s] * total).sum(-1, keepdim=True).clamp(min=1e-30)
                value = v[:, s] - held if update == "delta" else v[:, s]
                memory += sk[:, s, :, :, None] * value[:, :, None]
                norm += sk[:, s]
        scores = torch.einsum("bhk,bshk->bhs", q[:, t], k[:, begin : t + 1]) / 24**0.5
        local = torch.einsum("bhs,bshv->bhv", scores.softmax(-1), v[:, begin : t + 1])
        if t >= segment:
            far_off = torch.einsum("bhk,bhkv->bhv", sq[:, t], memory)
            far_off = far_off / (sq[:, t] * norm).sum(-1, keepdim=True)
            gate = mixer.blend.double().sigmoid()[:, None]
            local = gate * far_off + (1 - gate) * local
        rows.append(local.flatten(1))
    assert far(mixer(x)[0], mixer.out(torch.stack(rows, dim=1).float())) < 1e-5


@torch.no_grad()
def test_an_open_memory_is_linear_attention_over_the_segments_before(small: Frame, far: Far) -> None:
    mixer, x = infini(small, update="linear", segment=12), x_of()
    mixer.blend.fill_(50)
    q, k, v = mixer.project(x)
    products = torch.einsum("bthk,bshk->bhts", F.elu(q) + 1, F.elu(k) + 1)
    past = (torch.arange(LENGTH)[:, None] // 12 > torch.arange(LENGTH) // 12).float()
    weights = (products * past)[:, :, 12:]
    wanted = torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True), v)
    assert far(mixer(x)[0][:, 12:], mixer.out(wanted.flatten(2))) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("rotary", [1.0, 0.0])
def test_a_closed_memory_and_one_segment_are_full_attention(small: Frame, rotary: float, far: Far) -> None:
    full, x = Full(heads=2, head_dim=24, rotary=rotary).build(small), x_of()
    for segment, gate in ((76, 0.0), (76, -50.0), (12, -50.0)):
        mixer = infini(small, segment=segment, rotary=rotary)
        mixer.load_state_dict({**full.state_dict(), "blend": torch.full((2,), gate)})
        y = mixer(x)[0]
        parts = [full(x[:, s : s + segment])[0] for s in range(0, LENGTH, segment)]
        assert far(y, torch.cat(parts, dim=1)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 8, 9, 24, 25])
def test_a_step_of_infini_reads_what_it_is_priced_for(small: Frame, length: int) -> None:
    frame, x = replace(small, context=length, batch=2), x_of(length=length)
    mixer = infini(frame, segment=8)
    _, state = mixer(x[:, :-1], mixer.start(2, length))
    y, _ = mixer.step(x[:, -1], replace(state, keys=state.keys.clone(), values=state.values.clone()))
    opened = (length - 1) % 8
    for part in (state.keys, state.values):
        part[:, opened:] = torch.nan
    if length <= 8:
        state.matrix.fill_(torch.nan)
        state.norm.fill_(torch.nan)
    assert torch.equal(mixer.step(x[:, -1], state)[0], y)
    keys, values, matrix, norm = Infini(heads=2, head_dim=24, segment=8).cost(frame).cache
    assert keys.read_bytes == values.read_bytes == 2 * (opened + 1) * 48 * 4
    assert matrix.read_bytes == (0 if length <= 8 else 2 * 2 * 24 * 24 * 4)
    assert norm.read_bytes == (0 if length <= 8 else 2 * 2 * 24 * 4)


def test_prices_by_hand() -> None:
    frame = Frame(width=2048, context=10_000, batch=3)
    cost = mixer_of(read("transformer_xl[segment=512,memory=1024]").layers[0].branches[0]).cost(frame)
    assert cost.params == 5 * 2048 * 2048 + 2 * 2048
    # 10,000 is token 272 of its segment: it and 271 more, and the 1024 before them.
    assert cost.read_bytes == 3 * (272 + 1024) * 8192 and cost.stored_bytes == 3 * 1536 * 8192
    assert cost.flops_decode == 2 * 4 * 2048 * 2048 + 6 * 2048 * (272 + 1024)
    cost = mixer_of(read("infini[segment=2048,heads=16,head_dim=128]").layers[0].branches[0]).cost(frame)
    assert cost.params == 4 * 2048 * 2048 + 16
    state = 4 * 16 * (128 * 128 + 128)
    assert cost.stored_bytes == 3 * (8192 * 2048 + state)
    assert cost.read_bytes == 3 * (8192 * (10_000 - 4 * 2048) + state)
