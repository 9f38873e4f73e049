"""Operators under vmap: members side by side in the batch, with parameters of their own."""

import pytest
import torch
from torch.func import vmap
from torch.utils._pytree import tree_map

from kernels.stacked import is_stacked, stackable

MEMBERS, BATCH = 3, 4
CALLS = []


@stackable(shared=("mask",), own=("gain",), each=("matrix",))
def operator(x, state=None, mask=None, gain=None, matrix=None, *, scale=1.0):
    """A toy that knows its batch: it refuses tensors that vmap has hidden an axis of."""
    assert not any(is_stacked(tensor) for tensor in (x, state, mask, gain, matrix))
    CALLS.append(tuple(x.shape))
    y = x * scale
    if state is not None:
        assert state.shape == x.shape
        y = y + state
    if mask is not None:
        y = y * mask
    if gain is not None:
        y = y * (gain if gain.dim() == 2 else gain.expand_as(x))
    if matrix is not None:
        y = y @ matrix
    return y, y.sum(-1)


@pytest.fixture(autouse=True)
def _forget():
    CALLS.clear()


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def by_loop(call, *stacks):
    rows = [call(*(stack[m] for stack in stacks)) for m in range(MEMBERS)]
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def test_members_are_batch_entries_of_one_call():
    x, state = draw(MEMBERS, BATCH, 5), draw(MEMBERS, BATCH, 5).flip(0)
    y, total = vmap(lambda x, state: operator(x, state, scale=2.0))(x, state)
    assert CALLS == [(MEMBERS * BATCH, 5)]
    expected = by_loop(lambda x, state: operator(x, state, scale=2.0), x, state)
    torch.testing.assert_close((y, total), expected)


def test_an_axis_of_members_may_stand_anywhere():
    x = draw(BATCH, 5, MEMBERS)
    y, _ = vmap(operator, in_dims=2, out_dims=1)(x)
    torch.testing.assert_close(y, x.movedim(2, 1))


def test_what_all_share_is_given_to_each():
    x, state, mask = draw(MEMBERS, BATCH, 5), draw(BATCH, 5), draw(5)
    y, _ = vmap(lambda x: operator(x, state, mask))(x)
    assert CALLS == [(MEMBERS * BATCH, 5)]
    torch.testing.assert_close(y, (x + state) * mask)


def test_parameters_by_batch_entry_and_for_all():
    x, gain = draw(MEMBERS, BATCH, 5), draw(MEMBERS, 5)
    y, _ = vmap(lambda x, gain: operator(x, gain=gain))(x, gain)
    assert CALLS == [(MEMBERS * BATCH, 5)]
    torch.testing.assert_close(y, x * gain[:, None])
    y, _ = vmap(lambda x: operator(x, gain=gain[0]))(x)
    torch.testing.assert_close(y, x * gain[0])


def test_where_parameters_know_no_batch_each_member_is_called():
    x, matrix = draw(MEMBERS, BATCH, 5), draw(MEMBERS, 5, 5)
    y, _ = vmap(lambda x, matrix: operator(x, matrix=matrix))(x, matrix)
    assert CALLS == [(BATCH, 5)] * MEMBERS
    torch.testing.assert_close(y, x @ matrix)
    CALLS.clear()
    vmap(lambda x: operator(x, matrix=matrix[0]))(x)
    assert CALLS == [(MEMBERS * BATCH, 5)]


@stackable(own=("gain",), each=("matrices",))
def nested(x, previous, *, gain=None, matrices=None):
    """A toy whose state is a tuple in a tuple, beside a number that is no tensor; it answers with one too."""
    (first, second), scale = previous
    assert not any(is_stacked(tensor) for tensor in (x, first, second, *(gain or ()), *(matrices or ())))
    CALLS.append(tuple(x.shape))
    y = x * scale + first + second
    for matrix in matrices or ():
        y = y @ matrix
    for one in gain or ():
        y = y * (one if one.dim() == 2 else one.expand_as(y))
    return y, (x, (first - second, y.sum(-1)))


def test_tensors_in_tuples_are_folded_like_others():
    x, first, second = (draw(MEMBERS, BATCH, 5) + i for i in range(3))
    shared = draw(BATCH, 5)
    gain = draw(MEMBERS, 5)

    def call(x, first, second, gain):
        return nested(x, ((first, second), 2.0), gain=(gain, gain[0] * torch.ones(5)))

    got = vmap(call)(x, first, second, gain)
    assert CALLS == [(MEMBERS * BATCH, 5)]
    for m in range(MEMBERS):
        expected = call(x[m], first[m], second[m], gain[m])
        torch.testing.assert_close(tree_map(lambda part, m=m: part[m], got), expected)
    CALLS.clear()
    y, _ = vmap(lambda x: nested(x, ((x, shared), 1.0)))(x)
    assert CALLS == [(MEMBERS * BATCH, 5)]
    torch.testing.assert_close(y, 2 * x + shared)


def test_tensors_in_tuples_may_know_no_batch():
    x, matrix = draw(MEMBERS, BATCH, 5), draw(MEMBERS, 5, 5)
    y, (_, (_, total)) = vmap(lambda x, matrix: nested(x, ((x, x), 0.0), matrices=(matrix, matrix)))(
        x, matrix
    )
    assert CALLS == [(BATCH, 5)] * MEMBERS
    torch.testing.assert_close(y, 2 * x @ matrix @ matrix)
    torch.testing.assert_close(total, y.sum(-1))


@stackable(in_front=True)
def several(x, weight):
    CALLS.append(tuple(x.shape))
    return (x * weight).sum(-1)


def test_models_may_stand_in_front_of_all_tensors():
    x, weight = draw(MEMBERS, BATCH), draw(BATCH)
    torch.testing.assert_close(vmap(lambda x: several(x, weight))(x), x @ weight)
    torch.testing.assert_close(vmap(lambda y: several(weight, y))(x), x @ weight)
    torch.testing.assert_close(several(weight, weight), weight @ weight)
    assert CALLS == [(MEMBERS, BATCH)] * 2 + [(BATCH,)]


def test_gradients_reach_every_member():
    x, gain = draw(MEMBERS, BATCH, 5).requires_grad_(), draw(MEMBERS, 5).requires_grad_()
    stacked, _ = vmap(lambda x, gain: operator(x, gain=gain))(x, gain)
    expected = torch.autograd.grad((x * gain[:, None]).square().sum(), [x, gain])
    torch.testing.assert_close(torch.autograd.grad(stacked.square().sum(), [x, gain]), expected)


def test_a_shared_argument_that_differs_is_named():
    x, mask = draw(MEMBERS, BATCH, 5), draw(MEMBERS, 5)
    with pytest.raises(ValueError, match="mask differs between the members of a stack"):
        vmap(lambda x, mask: operator(x, None, mask))(x, mask)


def test_outside_of_vmap_nothing_changes():
    x = draw(BATCH, 5)
    torch.testing.assert_close(operator(x)[0], x)
    assert CALLS == [(BATCH, 5)]
