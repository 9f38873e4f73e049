"""The window on a CPU: however it is cut into tiles, kept or made again, it is the loop over queries; and on fused kernels."""

import itertools

import pytest
import torch

from kernels.softmax_attention import banded, chunked
from kernels.softmax_attention.ops import softmax_attention, softmax_attention_with_sums


def draw(time, keys, batch=2, heads=4, groups=2, key=8, value=12):
    """q, k and v by name."""
    return {
        "q": torch.randn(batch, time, heads, key),
        "k": torch.randn(batch, keys, groups, key),
        "v": torch.randn(batch, keys, groups, value),
    }


def with_sums(window, sinks=0):
    return lambda backend, *x: softmax_attention_with_sums(*x, window=window, sinks=sinks, backend=backend)


@pytest.mark.parametrize("kept", [0, 2**23])
@pytest.mark.parametrize("tile", [1, 2**13, 2**19])
def test_tiles_and_weights_made_again_change_nothing(agree, monkeypatch, tile, kept):
    monkeypatch.setattr(banded, "TILE_SCORES", tile)
    monkeypatch.setattr(banded, "JOINED_SCORES", tile)
    monkeypatch.setattr(banded, "KEPT_SCORES", kept)
    for (time, keys), window in itertools.product(((1, 140), (33, 33), (70, 200), (130, 131)), (1, 17, 40)):
        agree(with_sums(window), draw(time, keys), floor=0.1)
        agree(with_sums(window, min(5, keys - time)), draw(time, keys), floor=0.1)


@pytest.mark.parametrize("time", [1, 2, 15, 16, 17, 63, 64, 65, 128, 130])
def test_all_keys_of_short_texts_and_their_sums(agree, time):
    for more in (0, 5):
        agree(with_sums(None), draw(time, time + more), floor=0.1)
        agree(with_sums(time + more), draw(time, time + more, heads=3, groups=3), floor=0.1)


def test_extreme_scores(near):
    """Scores near 10⁴ keep about three digits in float32; what is made of them stays finite, gradients as well."""
    inputs = draw(150, 150)
    inputs["q"] *= 1e4
    expected = softmax_attention(*(x.double() for x in inputs.values()), window=20, backend="reference")
    leaves = [x.requires_grad_() for x in inputs.values()]
    output = softmax_attention(*leaves, window=20)
    near(output, expected, 2e-3)
    assert all(x.isfinite().all() for x in torch.autograd.grad(output.sum(), leaves))


def test_gradients_of_outputs_and_sums_in_float64():
    leaves = [x.double().requires_grad_() for x in draw(35, 40, 1, 2, 1, 2, 3).values()]
    assert torch.autograd.gradcheck(lambda *x: banded.banded(*x, 9, 0.7), leaves, fast_mode=True)


def test_nothing_is_kept_without_gradients(largest_bytes):
    inputs = draw(2048, 2048, 1, 8, 8).values()
    kept = largest_bytes(lambda: softmax_attention(*(x.clone().requires_grad_() for x in inputs), window=100))
    assert largest_bytes(lambda: softmax_attention(*inputs, window=100)) < kept / 2


@pytest.mark.parametrize(("time", "keys", "window"), [(130, 130, 7), (64, 200, 40), (1, 150, 30)])
def test_the_form_of_fused_kernels_is_the_same(near, time, keys, window):
    """What other devices run: blocks in the batch axis of one fused call."""
    q, k, v = draw(time, keys).values()
    block = min(max(window, chunked.SMALLEST_BLOCK), time)
    expected = softmax_attention(q, k, v, window=window, backend="reference")
    near(chunked._windowed(q, k, v, window, block, 8**-0.5), expected, 2e-6)
