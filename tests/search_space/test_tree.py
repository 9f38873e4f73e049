"""The tree: walked by hand, its equalities, what its steps read, and its price by hand."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from search_space.frame import Frame
from search_space.mixers.full import Full
from search_space.mixers.tree import Tree, TreeMixer
from search_space.nodes import Nodes

Far = Callable[[Tensor, Tensor], float]
LENGTH = 75


def x_of(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, 64)


def made(frame: Frame, **settings: Any) -> TreeMixer:
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 16, "chunk": 4, "fan_out": 2, "top_k": 2}
    mixer = Tree(**{**sizes, **settings}).build(frame)
    assert isinstance(mixer, TreeMixer)
    return mixer.eval()


def stepped(mixer: TreeMixer, x: Tensor, room: int = 0) -> Tensor:
    state, rows = mixer.start(x.shape[0], x.shape[1] + room), []
    for t in range(x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        rows.append(y)
    return torch.stack(rows, dim=1)


def walk(mixer: TreeMixer, q: Tensor, k: Tensor, t: int) -> tuple[list[range], list[range], list[range]]:
    """Spans of text that a query q [K] at t walks to over keys k [S, K]: found, left as summaries, entered at the bottom.

    Level by level from one with no node at all, each node by the tokens that it spans.
    """
    past, found, left, entered = t // mixer.chunk * mixer.chunk, [], [], []
    for level in reversed(range(8)):
        span, above = mixer.chunk * mixer.fan_out**level, mixer.chunk * mixer.fan_out ** (level + 1)
        inside = {s for parent in entered for s in range(parent.start, parent.stop, span)}
        loose = set(range(past // above * above, past // span * span, span))
        here = sorted(inside | loose)
        score = {s: float(k[s : s + span].mean(0) @ q) for s in here}
        best = sorted(here, key=lambda s, score=score: (-score[s], s))[: mixer.top_k]
        entered = [range(s, s + span) for s in best]
        found += [range(s, s + span) for s in here]
        left += [range(s, s + span) for s in here if s not in best]
    return found, left, entered


def written_out(mixer: TreeMixer, x: Tensor) -> Tensor:
    """One sequence, one token and one head at a time: scores and values of what the walk leads to, in one softmax."""
    own = mixer.projections
    q, k, v = (part[0].double() for part in own(x, 0))
    shared, rows = own.heads // own.kv_heads, []
    for t in range(x.shape[1]):
        heads = []
        for h in range(own.heads):
            g = h // shared
            asked = q[t, g * shared : (g + 1) * shared].sum(0)
            _, left, entered = walk(mixer, asked, k[:, g], t)
            begin = t // mixer.chunk * mixer.chunk
            tokens = [s for span in (*entered, range(begin, t + 1)) for s in span]
            keys = [k[s, g] for s in tokens] + [k[span, g].mean(0) for span in left]
            values = [v[s, g] for s in tokens] + [v[span, g].mean(0) for span in left]
            counts = torch.tensor([1.0] * len(tokens) + [float(len(span)) for span in left]).double()
            weights = counts * (torch.stack(keys) @ q[t, h] / own.head_dim**0.5).exp()
            heads.append(weights @ torch.stack(values) / weights.sum())
        rows.append(torch.cat(heads))
    return own.out(torch.stack(rows).float())[None]


@torch.no_grad()
@pytest.mark.parametrize(
    ("chunk", "fan_out", "top_k", "kv_heads"),
    [(4, 2, 2, 2), (4, 2, 1, 4), (4, 4, 1, 1), (8, 4, 2, 2), (4, 8, 4, 4), (4, 2, 4, 2), (36, 2, 1, 2)],
)
def test_it_is_written_out(
    small: Frame, chunk: int, fan_out: int, top_k: int, kv_heads: int, far: Far
) -> None:
    mixer = made(small, chunk=chunk, fan_out=fan_out, top_k=top_k, kv_heads=kv_heads, qk_norm=fan_out == 8)
    x = x_of(1)
    wanted = written_out(mixer, x)
    assert far(mixer(x)[0], wanted) < 1e-5
    # How many tokens a state may hold changes nothing, though its tree is higher.
    assert far(stepped(mixer, x), wanted) < 1e-5
    assert far(stepped(mixer, x, room=300), wanted) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("chunk", "top_k"), [(76, 1), (8, 16), (20, 4)])
@pytest.mark.parametrize("rotary", [1.0, 0.0])
def test_where_all_is_entered_it_is_full_attention(
    small: Frame, chunk: int, top_k: int, rotary: float, far: Far
) -> None:
    mixer, x = made(small, chunk=chunk, top_k=top_k, rotary=rotary), x_of()
    full = Full(heads=4, kv_heads=2, head_dim=16, rotary=rotary).build(small).eval()
    full.load_state_dict(
        {name.removeprefix("projections."): weight for name, weight in mixer.state_dict().items()}
    )
    for own in (mixer(x)[0], stepped(mixer, x)):
        assert far(own, full(x)[0]) < 1e-5
    fewer = made(small, chunk=4, top_k=2, rotary=rotary)
    fewer.load_state_dict(mixer.state_dict())
    assert far(fewer(x)[0], full(x)[0]) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_summaries_of_what_is_alike_lose_nothing(small: Frame, top_k: int, far: Far) -> None:
    # Nodes of the highest level span 16 tokens; within each the text repeats itself.
    x = x_of(length=5).repeat_interleave(16, dim=1)[:, :LENGTH]
    mixer = made(small, top_k=top_k, fan_out=4, rotary=0.0)
    full = Full(heads=4, kv_heads=2, head_dim=16, rotary=0.0).build(small).eval()
    full.load_state_dict(
        {name.removeprefix("projections."): weight for name, weight in mixer.state_dict().items()}
    )
    assert far(mixer(x)[0], full(x)[0]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("length", [3, 5, 20, 41, 64, 75])
def test_a_step_reads_what_it_is_priced_for(small: Frame, length: int) -> None:
    frame = replace(small, context=length)
    spec = Tree(heads=4, kv_heads=2, head_dim=16, chunk=4, fan_out=4, top_k=1, rotary=0.0)
    mixer, x = spec.build(frame), x_of(1, length)
    assert isinstance(mixer, TreeMixer)
    _, state = mixer(x[:, :-1], mixer.start(1, length))
    q, k, _ = mixer.projections(x, 0)
    asked = q[0, -1].unflatten(0, (2, 2)).sum(1)
    nodes, begin = Nodes(chunk=4, fan_out=4, tokens=length), (length - 1) // 4 * 4
    read = dict.fromkeys(("keys", "values", "summary keys", "summary values"), 0)
    for g in range(2):
        found, left, entered = walk(mixer, asked[g], k[0, :, g], length - 1)
        tokens = {s for span in (*entered, range(begin, length)) for s in span}
        levels = [length // (4 * 4**level) for level in range(len(nodes.counts))]
        # A level with a single node has no place in the table: nothing is to be chosen there.
        held = [[span for span in spans if len(span) in (4, 16) and len(span) <= 4 * 4 ** (len(levels) - 1)]
                for spans in (found, left)]  # fmt: skip
        place = [{nodes.offsets[len(s) // 16] + s.start // len(s) for s in spans} for spans in held]
        assert len(held[1]) == len(left)
        parts = (state.cache.keys, state.cache.values, state.keys, state.values)
        for part, seen, name in zip(parts, (tokens, tokens, *place), read, strict=True):
            hidden = torch.ones(part.shape[1], dtype=torch.bool)
            hidden[sorted(seen)] = False
            part[0, hidden, g] = torch.nan
            read[name] += len(seen)
    y, _ = mixer.step(x[:, -1], state)
    torch.testing.assert_close(y, mixer(x)[0][:, -1], rtol=1e-4, atol=1e-5)
    for tensor in spec.cost(frame).cache:
        assert tensor.read_bytes == read[tensor.name] * 16 * 4
        rows = sum(nodes.counts) if "summary" in tensor.name else length
        assert tensor.stored_bytes == rows * 2 * 16 * 4


def test_a_token_that_is_not_reached_learns_through_its_summary(small: Frame) -> None:
    mixer, x = made(small, top_k=1), x_of(1).requires_grad_()
    mixer(x)[0][:, 74].sum().backward()
    assert x.grad is not None
    assert (x.grad[0].abs().amax(-1) > 0).all()


def test_the_price_by_hand() -> None:
    frame = Frame(width=2048, context=8192)
    cost = Tree(chunk=64, fan_out=4, top_k=2, heads=16, kv_heads=2, head_dim=128).cost(frame)
    weights = 2 * 2048 * 2048 + 2 * 2048 * 256
    assert cost.params == weights
    # 127 chunks are past: one node of 64 chunks, entered; its 4 children and 3 roots, then twice 2 · 4 children and 3.
    found, left, tokens = 1 + 7 + 11 + 11, 0 + 5 + 9 + 9, 2 * 64 + 64
    row = 256 * 2
    assert [(own.stored_bytes // row, own.read_bytes // row) for own in cost.cache] == [
        (8192, tokens),
        (8192, tokens),
        (128 + 32 + 8 + 2, found),
        (128 + 32 + 8 + 2, left),
    ]
    assert cost.flops_decode == 2 * weights + 4 * 2048 * (tokens + left) + 2 * 256 * found
    # 1000 tokens have 15 whole chunks and 3 nodes of four.
    spec, work = Tree(chunk=64, fan_out=4, top_k=2, heads=16, kv_heads=2, head_dim=128), 0
    for t in range(1000):
        upper = t // 256
        lower = 4 * min(2, upper) + t // 64 % 4
        read = 64 * min(2, lower) + t % 64 + 1 + max(0, upper - 2) + max(0, lower - 2)
        work += 4 * 2048 * read + 2 * 256 * (upper + lower)
    assert spec.cost(replace(frame, context=1000)).flops_prefill == pytest.approx(2 * weights + work / 1000)


@pytest.mark.parametrize(
    ("tokens", "counts"),
    [(3, ()), (4, (1,)), (31, (7,)), (32, (8, 2)), (128, (32, 8, 2)), (520, (130, 32, 8, 2))],
)
def test_the_levels_of_a_tree(tokens: int, counts: tuple[int, ...]) -> None:
    nodes = Nodes(chunk=4, fan_out=4, tokens=tokens)
    assert nodes.counts == counts
    x = torch.randn(1, tokens, 2, 8)
    table = nodes.table(x)
    for level, offset in enumerate(nodes.offsets):
        span = 4 * 4**level
        for node in range(counts[level]):
            wanted = x[:, node * span : (node + 1) * span].mean(1)
            torch.testing.assert_close(table[:, offset + node], wanted)


def test_sizes_follow_the_frame() -> None:
    spec = Tree().sized(Frame(width=2048, train_length=4096))
    assert (spec.chunk, spec.heads, spec.kv_heads, spec.head_dim) == (64, 16, 16, 128)
    with pytest.raises(ValueError, match="tree: kv_heads=3 does not divide its 4 heads"):
        Tree(heads=4, kv_heads=3).sized(Frame(width=64))
