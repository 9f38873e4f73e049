"""States that several mixers keep: keys and values in order or in a ring, and the count of bytes of any state.

Letters: B batch, S slots, G key heads, K key width, V value width.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

ARBITRARY = 0.01


@dataclass(frozen=True, kw_only=True)
class KeyValue:
    """Keys [B, S, G, K] and values [B, S, G, V]; `length` tokens were seen. A ring where S is below what is to come."""

    keys: Tensor
    values: Tensor
    length: int


def start_key_value(
    batch: int,
    slots: int,
    heads: int,
    key_width: int,
    value_width: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> KeyValue:
    """An empty cache."""
    return KeyValue(
        keys=torch.zeros(batch, slots, heads, key_width, device=device, dtype=dtype),
        values=torch.zeros(batch, slots, heads, value_width, device=device, dtype=dtype),
        length=0,
    )


def append(state: KeyValue, keys: Tensor, values: Tensor) -> KeyValue:
    """Write [B, T, G, *] after what is there.

    Raises:
        ValueError: the cache has fewer free slots than tokens came.
    """
    push(state.keys, keys, state.length)
    return replace(state, length=push(state.values, values, state.length))


def push(cache: Tensor, new: Tensor, place: int) -> int:
    """Write new rows [B, T, …] into a cache [B, S, …] from a place on; the place behind them.

    Raises:
        ValueError: the cache has fewer rows from there on than tokens came.
    """
    end = place + new.shape[1]
    if end > cache.shape[1]:
        raise ValueError(
            f"{end} tokens do not fit a cache of {cache.shape[1]}: start it with a larger max_len"
        )
    cache[:, place:end] = new
    return end


def append_ring(state: KeyValue, keys: Tensor, values: Tensor, span: int, pinned: int = 0) -> KeyValue:
    """Write [B, T, G, *] over the oldest slots; the first `pinned` tokens keep the first slots, the rest go round.

    Position t lies in slot t while there is room, later in slot p + (t - p) mod (S - p).

    Raises:
        ValueError: the ring is shorter than the `span` that is read back, and would lose what is still wanted.
    """
    slots, start = state.keys.shape[1], state.length
    end = start + keys.shape[1]
    if end > slots and slots < span + pinned:
        raise ValueError(f"{end} tokens do not fit a ring of {slots}: start it with a larger max_len")
    around = max(1, slots - pinned)
    for first, last in ((start, min(end, pinned)), (max(start, pinned, end - around), end)):
        if first < last:
            places = _places(first, last, pinned, around, keys.device)
            new = slice(first - start, last - start)
            state.keys[:, places] = keys[:, new].to(state.keys.dtype)
            state.values[:, places] = values[:, new].to(state.values.dtype)
    return replace(state, length=end)


def read_ring(state: KeyValue, pinned: int = 0) -> tuple[Tensor, Tensor]:
    """What the ring holds in the order of time: the pinned keys and values, then the last of the others."""
    around = max(1, state.keys.shape[1] - pinned)
    first = torch.arange(min(pinned, state.length), device=state.keys.device)
    start = max(pinned, state.length - around)
    last = _places(start, max(start, state.length), pinned, around, state.keys.device)
    places = torch.cat([first, last])
    return state.keys[:, places], state.values[:, places]


def _places(first: int, last: int, pinned: int, around: int, device: torch.device) -> Tensor:
    """Slots of the positions first … last - 1, all pinned or none."""
    position = torch.arange(first, last, device=device)
    return position if last <= pinned else pinned + (position - pinned) % around


def read_span(state: KeyValue, first: int, end: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the positions first … end - 1, in the order of time, from a ring that holds them; no other is touched."""
    places = torch.arange(first, end, device=state.keys.device) % state.keys.shape[1]
    return state.keys[:, places], state.values[:, places]


def tensors_of(state: Any) -> Iterator[Tensor]:
    """Every tensor in a state value, nested ones included."""
    if isinstance(state, Tensor):
        yield state
    elif is_dataclass(state) and not isinstance(state, type):
        for item in fields(state):
            yield from tensors_of(getattr(state, item.name))
    elif isinstance(state, (tuple, list)):
        for own in state:
            yield from tensors_of(own)


def state_bytes(state: Any) -> int:
    """Bytes of every tensor in a state value."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(state))


def advance(state: Any, length: int) -> Any:
    """The state as if `length` tokens had been seen. For timing, not for results: what they left is arbitrary.

    Every number is written, because memory that was never written is one page of noughts, read for nothing.
    """
    for tensor in tensors_of(state):
        tensor.fill_(ARBITRARY)
    return _at(state, length)


def _at(state: Any, length: int) -> Any:
    if isinstance(state, (tuple, list)):
        return type(state)(_at(own, length) for own in state)
    if is_dataclass(state) and not isinstance(state, type):
        inside = {item.name: _at(getattr(state, item.name), length) for item in fields(state)}
        return replace(state, **(inside | {"length": length} if "length" in inside else inside))
    return state
