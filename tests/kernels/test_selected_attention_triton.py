"""Attention over chosen keys in Triton: ties, spans, caches, single queries and what else only its kernels can get wrong."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from kernels.selected_attention import triton
from kernels.selected_attention.ops import index_divergence, index_scores, select_keys, selected_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Near = Callable[..., None]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape).to(DEVICE)


def index_inputs(
    time: int, keys: int, batch: int = 2, heads: int = 3, width: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    return draw(batch, time, heads, width), draw(batch, keys, width), draw(batch, time, heads)


def whole(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Small whole numbers, whose scores are exact in every order of summation."""
    return tuple((2 * x).round().clamp(-3, 3) for x in tensors)


def derived(call: Callable[..., Tensor], *inputs: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The output, where it is finite, and the gradients of all inputs."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    output = call(*leaves)
    output = output.masked_fill(output.isinf(), 0)
    draws = torch.Generator().manual_seed(1)
    above = torch.randn(output.shape, generator=draws).to(output)
    return [output.detach(), *torch.autograd.grad(output, leaves, above)]


@pytest.fixture(params=[None, 2**9], ids=["one span", "many spans"])
def spans(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr(triton, "HELD", request.param)
        monkeypatch.setattr(triton, "TILE_OF_QUERIES", 8)


@pytest.mark.usefixtures("spans")
@pytest.mark.parametrize(
    ("time", "more", "keep"), [(1, 0, 3), (1, 600, 40), (17, 0, 5), (4, 290, 292), (20, 0, 64)]
)
def test_the_same_keys_are_chosen(time: int, more: int, keep: int) -> None:
    for q, k, weights in (
        index_inputs(time, time + more),
        whole(*index_inputs(time, time + more)),
    ):
        wanted = select_keys(q, k, weights, keep=keep, backend="reference")
        assert torch.equal(select_keys(q, k, weights, keep=keep, backend="triton"), wanted)


def test_the_later_of_equal_keys_are_chosen_over_many_tiles() -> None:
    q, k, weights = index_inputs(1, 9000, batch=1)
    k[:, 8500] = k[:, 20] = k[:, 7]
    for scores in (torch.zeros_like(weights), weights):
        wanted = select_keys(q, k, scores, keep=300, backend="reference")
        assert torch.equal(select_keys(q, k, scores, keep=300, backend="triton"), wanted)
    q, k, weights = index_inputs(18, 700, batch=1, heads=1)
    chosen = select_keys(q, k, torch.zeros_like(weights), keep=4, backend="triton")
    assert chosen[0].tolist() == [[t + 679, t + 680, t + 681, t + 682] for t in range(18)]


def test_what_is_not_a_number_is_chosen_and_stays_where_it_is() -> None:
    q, k, weights = index_inputs(40, 40)
    before = select_keys(q, k, weights, keep=8, backend="triton")
    k[0, 25, 0] = torch.nan
    after = select_keys(q, k, weights, keep=8, backend="triton")
    assert torch.equal(before[:, :25], after[:, :25]) and torch.equal(before[1], after[1])
    assert (after[0, 25:] == 25).any(-1).all()


@pytest.mark.parametrize("heads", [1, 70])
def test_places_may_repeat_and_lie_in_any_order(heads: int, near: Near) -> None:
    q, k, weights = index_inputs(5, 9, heads=heads)
    chosen = torch.tensor([7, 2, -1, 2, 0, 7]).expand(2, 5, 6).to(DEVICE)
    wanted = derived(
        lambda *own: index_scores(*own, chosen, backend="reference"), q, k, weights, dtype=torch.float64
    )
    actual = derived(lambda *own: index_scores(*own, chosen, backend="triton"), q, k, weights)
    for a, b in zip(actual, wanted, strict=True):
        near(a, b)
    assert (index_scores(q, k, weights, chosen, backend="triton").isinf() == (chosen < 0)).all()
    q, k = draw(2, 5, heads, 12), draw(2, 9, 12)
    read = [
        derived(
            lambda *own, backend=backend: selected_attention(*own, chosen, value=8, backend=backend)[0],
            q,
            k,
            dtype=dtype,
        )
        for backend, dtype in (("triton", None), ("reference", torch.float64))
    ]
    for a, b in zip(*read, strict=True):
        near(a, b)


def test_what_is_not_seen_scores_nothing() -> None:
    q, k, weights = index_inputs(19, 25)
    scores = index_scores(q, k, weights, None, backend="triton")
    hidden = torch.ones(19, 25, dtype=torch.bool).triu(7).to(DEVICE)
    assert (scores.isinf() == hidden).all() and (scores[:, hidden] < 0).all()


@pytest.mark.usefixtures("spans")
def test_spans_of_queries_make_no_difference(near: Near) -> None:
    index, keep = index_inputs(11, 20, heads=2), 6
    chosen = select_keys(*index, keep=keep)
    queries, keys, q, k = draw(2, 11, 3, 16), draw(2, 20, 3, 16), draw(2, 11, 2, 14), draw(2, 20, 14)

    def scores(backend: str) -> Callable[..., Tensor]:
        return lambda *own: index_scores(*own, chosen, backend=backend)

    def divergence(backend: str) -> Callable[..., Tensor]:
        return lambda *own: index_divergence(
            *own, queries.to(own[0].dtype), keys.to(own[0].dtype), backend=backend
        )

    def attention(backend: str) -> Callable[..., Tensor]:
        return lambda *own: selected_attention(*own, chosen, value=9, backend=backend)[0]

    for call, inputs in ((scores, index), (divergence, index), (attention, (q, k))):
        wanted = derived(call("reference"), *inputs, dtype=torch.float64)
        for a, b in zip(derived(call("triton"), *inputs), wanted, strict=True):
            near(a, b)


def test_nothing_as_large_as_the_text_squared_is_held(
    monkeypatch: pytest.MonkeyPatch, largest_bytes: Callable[[Callable[[], object]], int]
) -> None:
    monkeypatch.setattr(triton, "HELD", 2**9)
    monkeypatch.setattr(triton, "TILE_OF_QUERIES", 16)
    time, square = 48, 4 * 48 * 48
    index = [x.requires_grad_() for x in index_inputs(time, time, batch=1, heads=1)]
    chosen = select_keys(*index, keep=4, backend="triton")
    queries, keys = draw(1, time, 1, 8), draw(1, time, 1, 8)
    q, k = draw(1, time, 1, 8).requires_grad_(), draw(1, time, 8).requires_grad_()

    def learn() -> None:
        index_divergence(*index, queries, keys, backend="triton").backward()

    def score() -> None:
        index_scores(*index, chosen, backend="triton").sum().backward()

    def attend() -> None:
        selected_attention(q, k, chosen, value=4, backend="triton")[0].sum().backward()

    for call in (learn, score, attend, lambda: select_keys(*index, keep=4, backend="triton")):
        assert largest_bytes(call) <= square / 4


@pytest.mark.parametrize("value", [8, 12])
def test_a_query_that_chose_nothing_gives_nought(value: int, near: Near) -> None:
    """Also where the values are whole keys."""
    q, k = draw(2, 9, 3, 12), draw(2, 9, 12)
    chosen = select_keys(*index_inputs(9, 9), keep=4)
    chosen[:, 3] = -1
    results = {
        backend: derived(
            lambda *own, backend=backend: selected_attention(*own, chosen, value=value, backend=backend)[0],
            q,
            k,
        )
        for backend in ("triton", "reference")
    }
    for a, b in zip(results["triton"], results["reference"], strict=True):
        near(a, b)
    output, shares = selected_attention(q, k, chosen, value=value, backend="triton")
    assert shares is not None
    assert (output[:, 3] == 0).all() and (shares[:, 3] == 0).all()
    assert (results["triton"][1][:, 3] == 0).all()


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_hard_scores_stay_finite_and_near(size: float, near: Near) -> None:
    # Whole numbers, whose products are exact: rounded ones would differ by whole weights.
    q, k = whole(draw(2, 20, 3, 12), draw(2, 20, 12))
    q = size * q
    chosen = select_keys(*index_inputs(20, 20), keep=8)
    wanted, actual = (
        derived(
            lambda *own, backend=backend: selected_attention(
                *own, chosen, value=8, scale=1.0, backend=backend
            )[0],
            q,
            k,
            dtype=dtype,
        )
        for backend, dtype in (("reference", torch.float64), ("triton", None))
    )
    near(actual[0], wanted[0])
    # On the way back weights are exp(score - log-mass), as exact as the log-mass, whose last digit is a part of 2**24.
    rounding = 2**-23 * (q.abs().max() * k.abs().sum(-1).max()).item()
    for a, b in zip(actual[1:], wanted[1:], strict=True):
        near(a, b, bound=rounding, floor=1.0)


def test_one_query_reads_its_keys_in_parts_and_out_of_a_cache(
    near: Near, largest_bytes: Callable[[Callable[[], object]], int]
) -> None:
    cache, index, seen = draw(2, 1000, 20), draw(2, 1000, 8), 900
    q, index_q, weights = draw(2, 1, 3, 20), draw(2, 1, 3, 8), draw(2, 1, 3)
    k, index_k = cache[:, :seen], index[:, :seen]
    chosen = select_keys(index_q, index_k, weights, keep=300, backend="triton")
    assert torch.equal(chosen, select_keys(index_q, index_k, weights, keep=300, backend="reference"))
    chosen[1, 0, :200] = -1
    with torch.no_grad():
        output, shares = selected_attention(q, k, chosen, value=13, backend="triton")
        wanted, wanted_shares = selected_attention(
            q.double(), k.double(), chosen, value=13, backend="reference"
        )
        assert shares is not None and wanted_shares is not None
        near(output, wanted)
        near(shares, wanted_shares)

        def read() -> None:
            selected_attention(q, k, chosen[:, :, :50], value=13, shares=False, backend="triton")
            select_keys(index_q, index_k, weights, keep=300, backend="triton")

        # The cache is not copied.
        assert largest_bytes(read) < 2 * seen * 8 * 4
        nothing, _ = selected_attention(q, k, torch.full_like(chosen, -1), value=13, backend="triton")
    assert (nothing == 0).all()


def test_shares_are_made_only_where_they_are_asked_for() -> None:
    q, k = draw(1, 6, 2, 8), draw(1, 6, 8)
    chosen = select_keys(*index_inputs(6, 6, batch=1), keep=3)
    for backend in ("triton", "chunked", "reference"):
        output, shares = selected_attention(q, k, chosen, value=4, shares=False, backend=backend)
        assert shares is None
        assert torch.equal(output, selected_attention(q, k, chosen, value=4, backend=backend)[0])


def test_mixed_types_are_taken_as_the_wider_one(near: Near) -> None:
    q, k, weights = index_inputs(7, 11)
    chosen = select_keys(q, k, weights, keep=5)
    for own_q, own_k in ((q.half(), k), (q, k.half())):
        scores = index_scores(own_q, own_k, weights, chosen.clamp(min=0), backend="triton")
        assert scores.dtype == torch.float32
        near(scores, index_scores(own_q, own_k, weights, chosen.clamp(min=0), backend="reference"))


def test_the_divergence_teaches_the_index_alone() -> None:
    index = [x.requires_grad_() for x in index_inputs(9, 12)]
    queries, keys = draw(2, 9, 3, 16).requires_grad_(), draw(2, 12, 3, 16).requires_grad_()
    for backend in ("triton", "chunked", "reference"):
        divergence = index_divergence(*index, queries, keys, backend=backend)
        assert divergence.shape == () and divergence.dtype == torch.float32
        gradients = torch.autograd.grad(divergence, [*index, queries, keys], allow_unused=True)
        assert [x is not None for x in gradients] == [True, True, True, False, False]
        with torch.no_grad():
            assert torch.equal(index_divergence(*index, queries, keys, backend=backend), divergence)
