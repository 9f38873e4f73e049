"""What decays leave of a chunk, against products written out one by one."""

import math

import pytest
import torch

from kernels.decay import chunk_decays

GATES = {
    "mild": lambda *shape: -0.1 * torch.rand(shape),
    "none": lambda *shape: torch.zeros(shape),
    "fifty": lambda *shape: torch.full(shape, -50.0),
    "mild behind hard": lambda *shape: torch.where(
        torch.rand(shape) < 0.3, torch.tensor(-50.0), -0.02 * torch.rand(shape)
    ),
    "mild behind nothing left": lambda *shape: torch.where(
        torch.rand(shape) < 0.3, torch.tensor(-math.inf), -0.02 * torch.rand(shape)
    ),
}


def written_out(gate):
    """The three products of [..., C] by loops over tokens."""
    size, factor = gate.shape[-1], gate.exp()
    one, nought = torch.ones_like(factor[..., 0]), torch.zeros_like(factor[..., 0])

    def product(after, last):
        result = one
        for s in range(after + 1, last + 1):
            result = result * factor[..., s]
        return result

    rows = [
        torch.stack([product(j, i) if j <= i else nought for j in range(size)], dim=-1) for i in range(size)
    ]
    since = torch.stack([product(-1, i) for i in range(size)], dim=-1)
    until = torch.stack([product(j, size - 1) for j in range(size)], dim=-1)
    return torch.stack(rows, dim=-2), since, until


@pytest.mark.parametrize("size", [1, 2, 9, 33])
@pytest.mark.parametrize("gate", GATES)
def test_products_of_decays(gate, size):
    drawn = GATES[gate](2, 3, size)
    wanted = written_out(drawn.double())
    found = chunk_decays(drawn)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=1e-37)
    assert (found[0].triu(1) == 0).all()


@pytest.mark.parametrize("ask", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("gate", ["mild", "none", "fifty", "mild behind hard"])
def test_gradients_of_each_product(gate, ask):
    """Down to the last digits of a gradient that hard decays make tiny."""
    ours, theirs = (GATES[gate](2, 7).double().requires_grad_() for _ in range(2))
    theirs.data.copy_(ours.data)
    weights = [torch.randn_like(x) for x in written_out(ours.detach())]
    for gates, made in ((ours, chunk_decays(ours)), (theirs, written_out(theirs))):
        sum((weights[n] * made[n]).sum() for n in ask).backward()
        assert gates.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=0)


def test_gradients_in_float64():
    gate = (-torch.rand(2, 5, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(chunk_decays, gate)
