"""Attention over chosen keys: the block form against the loop, choices against a sort, and what must not matter."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.selected_attention import chunked
from kernels.selected_attention.ops import index_divergence, index_scores, select_keys, selected_attention

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 130)


def index_inputs(time: int, keys: int, batch: int = 2, heads: int = 3, width: int = 8) -> tuple[Tensor, ...]:
    return (
        torch.randn(batch, time, heads, width),
        torch.randn(batch, keys, width),
        torch.randn(batch, time, heads),
    )


def naive_choice(q: Tensor, k: Tensor, weights: Tensor, keep: int) -> list[list[set[int]]]:
    """The sets, by sorting Python tuples of score and place."""
    early, sets = k.shape[1] - q.shape[1], []
    scores = (weights[..., None] * (q @ k.mT[:, None]).clamp(min=0)).sum(2)
    for row in scores.tolist():
        ranked = [
            sorted(((value, s) for s, value in enumerate(own[: early + t + 1])), reverse=True)[:keep]
            for t, own in enumerate(row)
        ]
        sets.append([{s for _, s in best} for best in ranked])
    return sets


def sets_of(chosen: Tensor) -> list[list[set[int]]]:
    return [[{s for s in places if s >= 0} for places in row] for row in chosen.tolist()]


@pytest.fixture(params=[2**19, 2**9], ids=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", request.param)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("time", LENGTHS)
def test_the_best_keys_are_chosen(time: int, backend: str) -> None:
    for more, keep in ((0, 1), (0, 16), (5, 7), (40, 64), (3, 500)):
        q, k, weights = index_inputs(time, time + more)
        chosen = select_keys(q, k, weights, keep=keep, backend=backend)
        assert chosen.shape == (2, time, min(keep, time + more))
        assert (chosen.diff(dim=-1) > 0).logical_or(chosen[..., :-1] == -1).all()
        assert sets_of(chosen) == naive_choice(q, k, weights, keep)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_the_later_of_equal_keys_are_chosen(backend: str) -> None:
    q, k, weights = index_inputs(20, 30)
    chosen = select_keys(q, k, torch.zeros_like(weights), keep=4, backend=backend)
    assert chosen[0].tolist() == [[t + 7, t + 8, t + 9, t + 10] for t in range(20)]
    # Whole numbers make ties among some, and negative weights put them below those that score nought.
    q, k, weights = q.round(), k.round(), weights.round()
    assert sets_of(select_keys(q, k, weights, keep=9, backend=backend)) == naive_choice(q, k, weights, 9)


@pytest.mark.usefixtures("rescue")
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_what_is_not_a_number_is_chosen_and_stays_where_it_is(backend: str) -> None:
    q, k, weights = index_inputs(40, 40)
    before = select_keys(q, k, weights, keep=8, backend=backend)
    k[0, 25, 0] = torch.nan
    after = select_keys(q, k, weights, keep=8, backend=backend)
    assert torch.equal(before[:, :25], after[:, :25]) and torch.equal(before[1], after[1])
    assert (after[0, 25:] == 25).any(-1).all()


def attention_inputs(
    time: int, keys: int, keep: int, heads: int = 3, key: int = 12
) -> tuple[dict[str, Tensor], Tensor]:
    chosen = select_keys(*index_inputs(time, keys), keep=keep)
    return {"q": torch.randn(2, time, heads, key), "k": torch.randn(2, keys, key)}, chosen


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize(("more", "keep"), [(0, 16), (5, 7), (0, 500)])
def test_attention_equals_the_loop(time: int, more: int, keep: int, agree: Callable[..., None]) -> None:
    inputs, chosen = attention_inputs(time, time + more, keep)

    def call(backend: str, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return selected_attention(q, k, chosen, value=8, backend=backend)

    agree(call, inputs, ask=[0])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("time", LENGTHS)
def test_scores_equal_the_loop(time: int, agree: Callable[..., None]) -> None:
    names = ("q", "k", "weights")
    inputs = dict(zip(names, index_inputs(time, time + 3), strict=True))
    chosen = select_keys(*index_inputs(time, time + 3), keep=9)
    for places in (chosen, None):
        seen = torch.isfinite(index_scores(*inputs.values(), places))

        def call(
            backend: str, *own: Tensor, places: Tensor | None = places, seen: Tensor = seen
        ) -> tuple[Tensor]:
            scores = index_scores(*own, places, backend=backend)
            assert torch.equal(scores.isfinite(), seen)
            return (scores.masked_fill(~seen, 0),)

        agree(call, inputs)


def divergence_inputs(time: int, keys: int) -> dict[str, Tensor]:
    names = ("q", "k", "weights")
    return {
        **dict(zip(names, index_inputs(time, keys), strict=True)),
        "queries": torch.randn(2, time, 4, 6),
        "keys": torch.randn(2, keys, 4, 6),
    }


@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("more", [0, 5])
def test_the_divergence_equals_the_loop(time: int, more: int, agree: Callable[..., None]) -> None:
    inputs = divergence_inputs(time, time + more)

    def call(backend: str, *own: Tensor) -> tuple[Tensor]:
        return (index_divergence(*own, scale=0.7, backend=backend),)

    agree(call, inputs, floor=1e-6)


def test_members_of_a_stack_are_taken_side_by_side(near: Callable[..., None]) -> None:
    members = [tuple(divergence_inputs(9, 12).values()) for _ in range(3)]
    stacks = [torch.stack(column) for column in zip(*members, strict=True)]
    index = [x.requires_grad_() for x in stacks[:3]]

    def learn(*own: Tensor) -> Tensor:
        chosen = select_keys(*own[:3], keep=4).clamp(min=0)
        return index_divergence(*own) + index_scores(*own[:3], chosen).sum()

    together = torch.func.vmap(learn)(*stacks)
    apart = torch.stack([learn(*(x[m] for x in stacks)) for m in range(3)])
    near(together.detach(), apart.detach())
    weights = torch.tensor([1.0, -2.0, 0.5])
    gradients = (torch.autograd.grad(x @ weights, index) for x in (together, apart))
    for a, b in zip(*gradients, strict=True):
        near(a, b)


def test_the_divergence_written_out(near: Callable[..., None]) -> None:
    inputs = {name: x.double() for name, x in divergence_inputs(9, 12).items()}
    hidden = torch.ones(9, 12, dtype=torch.bool).triu(4)
    queries, keys = inputs.pop("queries"), inputs.pop("keys")
    shares = torch.einsum("bthk,bshk->bhts", queries, keys) / 6**0.5
    shares = shares.masked_fill(hidden, -torch.inf).softmax(-1).mean(1)
    leaves = [x.requires_grad_() for x in inputs.values()]
    scores = index_scores(*leaves, None)
    index = scores.softmax(-1)
    wanted = (shares * (shares / index).log().masked_fill(hidden, 0)).sum() / 18
    actual = index_divergence(*leaves, queries, keys)
    near(actual.detach(), wanted.detach(), bound=1e-10)
    # Its gradient by the scores is softmax(I) − p.
    slopes = ((index - shares) / 18).detach()
    for a, b in zip(
        torch.autograd.grad(actual, leaves),
        torch.autograd.grad(scores.masked_fill(hidden, 0), leaves, slopes),
        strict=True,
    ):
        near(a, b, bound=1e-10)


def test_over_all_keys_it_is_softmax_attention(near: Callable[..., None]) -> None:
    q, k = torch.randn(2, 50, 3, 12), torch.randn(2, 50, 12)
    chosen = select_keys(*index_inputs(50, 50), keep=50)
    output, shares = selected_attention(q, k, chosen, value=8)
    scores = torch.einsum("bthk,bsk->bhts", q, k) / 12**0.5
    weights = scores.masked_fill(~torch.ones(50, 50).tril().bool(), -torch.inf).softmax(-1)
    near(output, torch.einsum("bhts,bsv->bthv", weights, k[..., :8]))
    # Ascending places with −1 in front: query t has its own weights at the end.
    for t in (0, 7, 49):
        near(shares[:, t, 49 - t :], weights.mean(1)[:, t, : t + 1])


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_query_that_chose_nothing_gives_nought(backend: str) -> None:
    inputs, chosen = attention_inputs(9, 9, 4)
    chosen[:, 3] = -1
    q, k = (x.requires_grad_() for x in inputs.values())
    output, shares = selected_attention(q, k, chosen, value=8, backend=backend)
    assert (output[:, 3] == 0).all() and (shares[:, 3] == 0).all()
    output.sum().backward()
    assert q.grad is not None and (q.grad[:, 3] == 0).all() and q.grad.isfinite().all()
    assert k.grad is not None and k.grad.isfinite().all()


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_hard_scores(size: float, agree: Callable[..., None]) -> None:
    inputs, chosen = attention_inputs(33, 33, 8)
    inputs["q"] = size * inputs["q"]

    def call(backend: str, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return selected_attention(q, k, chosen, value=8, scale=1.0, backend=backend)

    agree(call, inputs, ask=[0], floor=1.0)


@pytest.mark.usefixtures("rescue")
def test_no_nan_of_the_future_reaches_the_past() -> None:
    inputs, chosen = attention_inputs(30, 30, 6)
    before, _ = selected_attention(**inputs, chosen=chosen, value=8)
    inputs["k"][:, 20] = torch.nan
    after, _ = selected_attention(**inputs, chosen=chosen, value=8)
    assert torch.equal(before[:, :20], after[:, :20])


def test_gradients_in_float64() -> None:
    inputs, chosen = attention_inputs(6, 8, 3, heads=2, key=5)
    q, k = (x.double().requires_grad_() for x in inputs.values())
    assert torch.autograd.gradcheck(lambda q, k: selected_attention(q, k, chosen, value=3)[0], (q, k))
    index = [x.double().requires_grad_() for x in index_inputs(6, 8)]
    places = select_keys(*index, keep=3).clamp(min=0)
    assert torch.autograd.gradcheck(lambda *own: index_scores(*own, places), index)
    queries, keys = torch.randn(2, 6, 2, 5).double(), torch.randn(2, 8, 2, 5).double()
    assert torch.autograd.gradcheck(lambda *own: index_divergence(*own, queries, keys), index)


def test_low_precision_and_types(near: Callable[..., None]) -> None:
    inputs, chosen = attention_inputs(20, 20, 6)
    exact, _ = selected_attention(**inputs, chosen=chosen, value=8)
    rough, shares = selected_attention(
        **{name: x.bfloat16() for name, x in inputs.items()}, chosen=chosen, value=8
    )
    assert rough.dtype == torch.bfloat16 and shares.dtype == torch.float32 and not shares.requires_grad
    near(rough.float(), exact, bound=2e-2)


def test_nothing_as_large_as_the_text_squared_is_held(
    largest_bytes: Callable[[Callable[[], object]], int],
) -> None:
    time, keep = 2048, 16
    index = index_inputs(time, time, batch=1, heads=1)
    q, k = torch.randn(1, time, 1, 8, requires_grad=True), torch.randn(1, time, 8, requires_grad=True)
    chosen = select_keys(*index, keep=keep)
    square = 4 * time * time
    assert largest_bytes(lambda: select_keys(*index, keep=keep)) <= square / 4
    assert largest_bytes(lambda: selected_attention(q, k, chosen, value=4)[0].sum().backward()) <= square / 8
    leaves = [x.requires_grad_() for x in index]
    assert largest_bytes(lambda: index_scores(*leaves, chosen).sum().backward()) <= square / 8
    queries, keys = torch.randn(1, time, 1, 8), torch.randn(1, time, 1, 8)
    assert largest_bytes(lambda: index_divergence(*leaves, queries, keys).backward()) <= square / 8


def test_wrong_shapes_are_refused() -> None:
    q, k, weights = index_inputs(6, 8)
    for bad in ((q, k[..., :4], weights), (q, k, weights[:, :3]), (q[0], k, weights), (q, k[:, :5], weights)):
        with pytest.raises(ValueError, match="select_keys"):
            select_keys(*bad, keep=3)
    with pytest.raises(ValueError, match="at least 1"):
        select_keys(q, k, weights, keep=0)
    chosen = select_keys(q, k, weights, keep=3)
    queries, keys = torch.randn(2, 6, 4, 5), torch.randn(2, 8, 4, 5)
    for name, bad in (("queries", (queries[:, 1:], keys)), ("keys", (queries, keys[:, :, :3]))):
        with pytest.raises(ValueError, match=f"index_divergence: {name}"):
            index_divergence(q, k, weights, *bad)
    with pytest.raises(ValueError, match="index_scores: chosen"):
        index_scores(q, k, weights, chosen[:, :2])
    with pytest.raises(ValueError, match="from 1 to 8"):
        selected_attention(q, k, chosen, value=9)
    with pytest.raises(ValueError, match="selected_attention: chosen"):
        selected_attention(q, k, chosen[:, 1:], value=4)
