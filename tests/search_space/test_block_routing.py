"""Mixers that choose blocks of the text: special cases that are other formulas, ties, what a step touches, prices."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from search_space.frame import Frame
from search_space.mixers.full import Full
from search_space.mixers.moba import MoBA, MoBAMixer
from search_space.positions import Positions, Scaling
from search_space.routing import block_sums, choose, mean_chosen
from search_space.spec import Mixer, MixerSpec
from search_space.state import state_bytes, tensors_of

Far = Callable[[Tensor, Tensor], float]
LENGTH = 70


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def x_of(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, 64)


def steps(mixer: Mixer, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    rows = []
    for t in range(x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        rows.append(y)
    return torch.stack(rows, dim=1), state


class Reads(TorchDispatchMode):
    """The bytes of some tensors that operations other than writing read, each counted once."""

    def __init__(self, watched: list[Tensor]) -> None:
        super().__init__()
        self.read = {
            x.untyped_storage().data_ptr(): torch.zeros(x.numel(), dtype=torch.bool) for x in watched
        }
        self.each = watched[0].element_size()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and not func.overloadpacket.__name__.endswith("_"):
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, Tensor) and x.untyped_storage().data_ptr() in self.read:
                    read = self.read[x.untyped_storage().data_ptr()]
                    place = torch.arange(len(read)).as_strided(x.shape, x.stride(), x.storage_offset())
                    if func.overloadpacket.__name__ == "index":
                        place = func(place, *args[1:])
                    read[place.flatten()] = True
        return func(*args, **(kwargs or {}))

    @property
    def bytes(self) -> int:
        return sum(int(read.sum()) for read in self.read.values()) * self.each


def bytes_read(mixer: Mixer, x: Tensor, state: Any, watched: list[Tensor]) -> int:
    with Reads(watched) as reads:
        mixer.step(x, state)
    return reads.bytes


def test_of_equal_scores_the_first_is_chosen() -> None:
    inf = math.inf
    scores = torch.tensor(
        [[0.0, 1.0, 1.0, 0.0, 1.0], [-inf, -inf, 2.0, -inf, -inf], [3.0, 3.0, 3.0, 4.0, -inf]]
    )
    assert choose(scores, 3).tolist() == [[1, 2, 4], [2, -1, -1], [3, 0, 1]]
    assert choose(scores, 9).shape == (3, 5)
    assert choose(torch.zeros(1, 40), 3).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("first", [0, 3, 8, 13])
def test_sums_by_block(first: int, far: Far) -> None:
    keys = torch.randn(2, 21, 3, 4)
    sums = block_sums(keys, first, 8)
    for number in range(sums.shape[1]):
        inside = [t for t in range(21) if (first + t) // 8 == first // 8 + number]
        assert far(sums[:, number], keys[:, inside].sum(1)) < 1e-6
    assert sums.shape[1] == (first + 20) // 8 - first // 8 + 1


def moba_by_hand(mixer: MoBAMixer, x: Tensor, block: int, top_k: int, shared: bool = False) -> Tensor:
    """One query and one head after another."""
    size = mixer.head_dim
    q, k, v = (layer(x).unflatten(-1, (-1, size)) for layer in (mixer.query, mixer.key, mixer.value))
    positions = Positions(kind="rope", fraction=mixer.spec.rotary, base=1e4, scaling=Scaling())
    q, k = positions.turn(q, 0), positions.turn(k, 0)
    group = mixer.heads // mixer.kv_heads
    output = torch.zeros_like(q)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for h in range(mixer.heads):
                keys, values = k[b, :, h // group], v[b, :, h // group]
                asks = q[b, t, h]
                if shared:
                    asks = q[b, t, h // group * group : (h // group + 1) * group].sum(0)
                here = t // block
                score = [float(asks @ keys[i * block : (i + 1) * block].mean(0)) for i in range(here)]
                best = sorted(range(here), key=lambda i: -score[i])[: top_k - 1]
                seen = [
                    s for i in sorted([*best, here]) for s in range(i * block, min(t + 1, i * block + block))
                ]
                weights = (keys[seen] @ q[b, t, h] / size**0.5).softmax(0)
                output[b, t, h] = weights @ values[seen]
    return mixer.out(output.flatten(2))


@pytest.mark.parametrize(("kv_heads", "shared"), [(4, False), (2, False), (2, True)])
@pytest.mark.parametrize(("block", "top_k"), [(8, 3), (4, 2), (12, 4)])
def test_moba_written_out(
    small: Frame, far: Far, kv_heads: int, shared: bool, block: int, top_k: int
) -> None:
    mixer = MoBA(block=block, top_k=top_k, kv_heads=kv_heads, shared=shared).build(small)
    assert isinstance(mixer, MoBAMixer)
    x = 3 * x_of(1, 45)
    wanted = moba_by_hand(mixer, x, block, top_k, shared)
    assert far(mixer(x)[0], wanted) < 1e-4
    assert far(steps(mixer, x, mixer.start(1, 45))[0], wanted) < 1e-4


@pytest.mark.parametrize(("block", "top_k"), [(12, 6), (20, 4), (LENGTH + 2, 2), (128, 2)])
def test_moba_that_reads_every_block_is_full_attention(
    small: Frame, far: Far, block: int, top_k: int
) -> None:
    full, mixer = Full(kv_heads=2, qk_norm=True, rotary=0.5).build(small), None
    mixer = MoBA(block=block, top_k=top_k, kv_heads=2, qk_norm=True, rotary=0.5).build(small)
    mixer.load_state_dict(full.state_dict())
    x = x_of()
    assert far(mixer(x)[0], full(x)[0]) < 1e-5
    fewer = MoBA(block=block // 8 * 4, top_k=2, kv_heads=2, qk_norm=True, rotary=0.5).build(small)
    fewer.load_state_dict(full.state_dict())
    if block < LENGTH:
        assert far(fewer(x)[0], full(x)[0]) > 1e-2


def test_moba_of_one_block_is_attention_within_blocks(small: Frame, far: Far) -> None:
    full, mixer = Full(rotary=0.0).build(small), MoBA(block=16, top_k=1, rotary=0.0).build(small)
    mixer.load_state_dict(full.state_dict())
    x = x_of()
    within = torch.cat([full(part)[0] for part in x.split(16, dim=1)], dim=1)
    assert far(mixer(x)[0], within) < 1e-5
    assert far(steps(mixer, x, mixer.start(2, LENGTH))[0], within) < 1e-5


@pytest.mark.parametrize("spec", [MoBA(block=8, top_k=3), MoBA(block=8, kv_heads=2)], ids=str)
def test_no_future_under_routing(small: Frame, far: Far, spec: MixerSpec) -> None:
    mixer, x = spec.build(small), 3 * x_of()
    y, _ = mixer(x)
    for t in (0, 7, 8, 40, 63, 68):
        for future in (100.0 * torch.randn(2, LENGTH - t - 1, 64), torch.full((), torch.nan)):
            changed = x.clone()
            changed[:, t + 1 :] = future
            assert far(mixer(changed)[0][:, : t + 1], y[:, : t + 1]) < 1e-5


@pytest.mark.parametrize("spec", [MoBA(block=8, top_k=3), MoBA(block=4, kv_heads=2)], ids=str)
def test_a_prefill_may_be_cut_everywhere(small: Frame, far: Far, spec: MixerSpec) -> None:
    mixer, x = spec.build(small), 3 * x_of(1, 40)
    whole, _ = mixer(x)
    for cut in range(1, 40):
        first, state = mixer(x[:, :cut], mixer.start(1, 40))
        rest, _ = steps(mixer, x[:, cut:], state)
        assert far(torch.cat([first, rest], 1), whole) < 1e-4
        again, state = mixer(x[:, :cut], mixer.start(1, 40))
        assert far(torch.cat([again, mixer(x[:, cut:], state)[0]], 1), whole) < 1e-4


@pytest.mark.parametrize("length", [1, 5, 8, 9, 31, 64, 65])
@pytest.mark.parametrize(("kv_heads", "shared"), [(4, False), (2, True)])
def test_a_step_of_moba_reads_what_is_priced(small: Frame, length: int, kv_heads: int, shared: bool) -> None:
    spec = MoBA(block=8, top_k=3, kv_heads=kv_heads, shared=shared)
    mixer, x = spec.build(small), x_of(1, length)
    state = mixer.start(1, 96)
    if length > 1:
        _, state = mixer(x[:, :-1], state)
    keys, values, sums = spec.cost(replace(small, context=length)).cache
    caches = [state.cache.keys, state.cache.values]
    assert bytes_read(mixer, x[:, -1], state, caches) == keys.read_bytes + values.read_bytes
    assert bytes_read(mixer, x[:, -1], state, [state.sums]) == sums.read_bytes
    apart = replace(spec, kv_heads=2, shared=False)
    mixer = apart.build(small)
    _, state = mixer(x, mixer.start(1, 96))
    priced = apart.cost(replace(small, context=length + 1)).cache[0].read_bytes
    assert bytes_read(mixer, x[:, 0], state, [state.cache.keys]) <= priced


def test_moba_by_hand() -> None:
    """Width 2048, 16 heads of 128, blocks of 512, three read: 8 KiB a token, 4 KiB a block and 8 KiB more in float32."""
    frame = Frame(width=2048, context=131072)
    cost = MoBA(block=512).cost(frame)
    assert cost.params == 4 * 2048**2
    assert cost.stored_bytes == 8192 * 131072 + 256 * 2048 * 4
    assert cost.read_bytes == 8192 * 3 * 512 + 256 * 2048 * 4
    attended, scored = 4 * 2048 * 1536, 2 * 2048 * 255
    assert cost.flops_decode == 2 * 4 * 2048**2 + attended + scored
    assert MoBA(block=512).cost(replace(frame, context=131073)).read_bytes == 8192 * 1025 + 257 * 2048 * 4
    grouped = MoBA(block=512, kv_heads=4)
    assert grouped.cost(frame).read_bytes == 2048 * (4 * 1024 + 512) + 256 * 512 * 4
    assert replace(grouped, shared=True).cost(frame).read_bytes == 2048 * 1536 + 256 * 512 * 4
    seen = [min(t // 8, 2) * 8 + t % 8 + 1 for t in range(77)]
    assert mean_chosen(77, 8, 3) == pytest.approx(sum(seen) / 77)
    assert mean_chosen(77, 128, 3) == 39


def test_the_state_is_what_is_priced(small: Frame) -> None:
    for spec in (MoBA(block=8, kv_heads=2),):
        for context in (1, 7, 8, 9, 90):
            frame = replace(small, context=context)
            state = spec.build(frame).start(3, context)
            assert state_bytes(state) == spec.cost(replace(frame, batch=3)).stored_bytes
            assert all(tensor.isfinite().all() for tensor in tensors_of(state))
