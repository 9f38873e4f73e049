"""Filters of diagonal plus rank-one state spaces, all frequencies at once through Cauchy sums.

Letters: B batch, T time, C channels, N pairs of conjugates, M = 2N real numbers of a state, L taps (a power of two),
F = L/2 + 1 frequencies, A blocks of c tokens.  As in S4, arXiv:2111.00396, appendix C.3; the form without poles on
the circle is derived here.

The spectrum of the filter cut after L taps is, at z = exp(−iθ), g = (2/Δ)(1 − z)/(1 + z) and C̃ = C (1 − Ā^L),
    2/(1 + z) · [k(C̃, B) − k(C̃, P) k(P*, B) / (1 + k(P*, P))],   k(u, v) = Σ u v / (g − Λ).
At z = −1 it is 0/0 as it stands, with the limit (Δ/2) C̃ B. With s = sin θ/2, c = cos θ/2 and μ = (Δ/2) Λ,
    1/(g − Λ) = (Δ/2) c S,   S = 1/(i s − c μ),   2/(1 + z) = exp(iθ/2)/c,
the cosines cancel, and what is left is regular everywhere and of the size of one:
    exp(iθ/2) (Δ/2) · [S(C̃, B) − (Δ/2) c S(C̃, P) S(P*, B) / (1 + (Δ/2) c S(P*, P))].
A mode and its conjugate share one denominator, d = (i s − c μ)(i s − c μ̄), and their sum is
    w S + conj(w) S̄ = (i s 2 Re w − c 2 Re(w μ̄)) / d,
so that all four sums are real products of 1/d with eight columns.

Ā^L and the powers in a carried state come from squaring the dense real matrix. Its steps never lengthen a state,
because A + A* = 2 Re Λ − 2 P P* is negative, so rounding does not grow.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.cauchy_filter.reference import working_dtypes

AT_ONCE = 1 << 23
"""Most numbers in one table of channels, frequencies and modes; longer lists of channels are cut."""


def _real(x: Tensor) -> Tensor:
    """[..., N] complex → [..., M], real parts first."""
    return torch.cat([x.real, x.imag], dim=-1)


def _complex(x: Tensor) -> Tensor:
    """[..., M] → [..., N] complex."""
    return torch.complex(*x.chunk(2, dim=-1))


def _reader(read: Tensor) -> Tensor:
    """C [C, N] as what a real state is multiplied with: [C, M]."""
    return torch.cat([2 * read.real, -2 * read.imag], dim=-1)


class Discrete(NamedTuple):
    """x ← x + change ⊙ x − column · 2 Re(row · x) + write · u, each [C, N] complex.

    Ā is a diagonal and a rank one as A is. What it adds is kept, not what it leaves: where Δ is small, Ā is nearly
    one, and float32 would round away what matters.
    """

    change: Tensor
    column: Tensor
    row: Tensor
    write: Tensor


def discrete(pole: Tensor, low_rank: Tensor, write: Tensor, step: Tensor) -> Discrete:
    """The bilinear rule by Woodbury's identity; shapes as in `ops.cauchy_discrete`."""
    real, modes = working_dtypes(pole, low_rank, write, step)
    pole, low_rank, write = (x.to(modes) for x in (pole, low_rank, write))
    half = (step.to(real) / 2).unsqueeze(-1)
    solved = 1 / (1 - half * pole)
    change = 2 * half * pole * solved
    row, column = low_rank.conj(), half * solved * low_rank
    share = 1 / (1 + 2 * (row * column).real.sum(-1, keepdim=True))
    entered = 2 * half * solved * write
    corrected = entered - column * (2 * share * (row * entered).real.sum(-1, keepdim=True))
    return Discrete(change, column, share * row * (2 + change), corrected)


def _next(x: Tensor, known: Discrete) -> Tensor:
    """What a token of nought adds to x [..., C, N]."""
    return known.change * x - known.column * (2 * (known.row * x).real.sum(-1, keepdim=True))


def step(u: Tensor, known: Discrete, read: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token in O(N) a channel; shapes as in `ops.cauchy_step`."""
    real, modes = working_dtypes(u, read, state, known.change)
    x = state.to(modes)
    x = x + _next(x, known) + known.write * u.to(real).unsqueeze(-1)
    return 2 * (x * read.to(modes)).real.sum(-1).to(u.dtype), x


def _squares(known: Discrete, count: int) -> list[Tensor]:
    """Ā − 1, Ā² − 1, Ā⁴ − 1, … as [C, M, M] that act on rows."""
    one = torch.eye(known.row.shape[1], dtype=known.row.dtype, device=known.row.device)
    found = [_real(_next(torch.cat([one, 1j * one]).unsqueeze(1), known)).transpose(0, 1).contiguous()]
    while len(found) < count:
        found.append(torch.baddbmm(found[-1], found[-1], found[-1], beta=2))
    return found


def _after(rows: Tensor, square: Tensor) -> Tensor:
    """rows [C, R, M] as many steps on as `square` holds."""
    return torch.baddbmm(rows, rows, square)


def _chain(first: Tensor, squares: list[Tensor]) -> Tensor:
    """first [C, R, M] and its next steps [C, R, 2^k, M], each k steps of the first of the k squares apart."""
    rows = first.unsqueeze(2)
    for square in squares:
        later = _after(rows.flatten(1, 2), square).view_as(rows)
        rows = torch.cat([rows, later], dim=2)
    return rows


def _cauchy(modulus: Tensor, decay: Tensor, columns: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    """Σ_n columns / d: modulus |μ| and decay Re μ [C, N], columns [C, N, 8], sine, cosine [F] → complex [C, F, 8]."""
    reach = cosine[:, None] * modulus.unsqueeze(1)
    real = (reach - sine[:, None]) * (reach + sine[:, None])
    imag = (-2 * sine * cosine)[:, None] * decay.unsqueeze(1)
    over = 1 / torch.addcmul(real * real, imag, imag)
    return torch.complex(torch.bmm(real * over, columns), -torch.bmm(imag * over, columns))


def _spectrum(
    pole: Tensor, low_rank: Tensor, write: Tensor, cut: Tensor, half: Tensor, length: int
) -> Tensor:
    """The spectrum [C, F] of the filter whose C̃ is `cut` [C, N]."""
    angle = torch.arange(length // 2 + 1, dtype=torch.float64, device=pole.device) * (math.pi / length)
    # In float64 and rounded once; what is exactly nought at the ends stays so.
    sine, cosine = angle.sin().to(half.dtype), angle.cos().to(half.dtype)
    turn = torch.complex(cosine, sine)
    poles = half * pole
    products = torch.stack(
        torch.broadcast_tensors(
            cut * write, cut * low_rank, low_rank.conj() * write, low_rank * low_rank.conj()
        ),
        dim=-1,
    )
    ends = torch.cat([2 * products.real, 2 * (products * poles.conj().unsqueeze(-1)).real], dim=-1)
    sums = _cauchy(poles.abs(), poles.real, ends, sine, cosine)
    over = 1j * sine[:, None] * sums[..., :4] - cosine[:, None] * sums[..., 4:]
    cb, cp, pb, pp = over.unbind(-1)
    fade = half * cosine
    return turn * half * (cb - fade * cp * pb / (1 + fade * pp))


def cauchy_filter(
    pole: Tensor, low_rank: Tensor, write: Tensor, read: Tensor, step: Tensor, length: int
) -> Tensor:
    """Cauchy sums and an inverse FFT; shapes as in `ops.cauchy_filter`."""
    real, modes = working_dtypes(pole, low_rank, write, read, step)
    pole, low_rank, write, read = (x.to(modes) for x in (pole, low_rank, write, read))
    doublings = max(1, (length - 1).bit_length())
    size = 1 << doublings
    channels = max(1, AT_ONCE // (size * len(pole)))
    pieces = []
    with torch.autocast(pole.device.type, enabled=False):
        for delta, own in zip(step.to(real).split(channels), read.split(channels), strict=True):
            rows = _reader(own).unsqueeze(-1)
            power = _squares(discrete(pole, low_rank, write, delta), doublings + 1)[-1]
            left = -torch.bmm(power, rows).squeeze(-1)
            cut = _complex(left).conj() / 2
            pieces.append(
                torch.fft.irfft(_spectrum(pole, low_rank, write, cut, delta.unsqueeze(-1) / 2, size), n=size)
            )
    return torch.cat(pieces)[:, :length]


def cauchy_state(
    u: Tensor, pole: Tensor, low_rank: Tensor, write: Tensor, step: Tensor, state: Tensor | None
) -> Tensor:
    """Sums within blocks, then pairs of blocks; shapes as in `ops.cauchy_state`."""
    real, modes = working_dtypes(u, pole, low_rank, write, step, state)
    _, time, channels = u.shape
    bits = time.bit_length()
    known = discrete(pole.to(modes), low_rank, write, step)
    with torch.autocast(u.device.type, enabled=False):
        squares = _squares(known, bits + 1)
        within, across = squares[: bits // 2], squares[bits // 2 : bits]
        steps = _chain(_real(known.write).unsqueeze(1), within).squeeze(1)
        # Noughts in front fade to nothing; the newest token is the last of its block.
        inputs = pad(u.to(real).permute(2, 0, 1), ((1 << bits) - time, 0))
        sums = inputs.reshape(channels, -1, steps.shape[1]) @ steps.flip(1)
        for square in across:
            early, late = sums.unflatten(1, (-1, 2)).unbind(2)
            sums = late + _after(early, square)
        if state is not None:
            held = _real(state.to(modes)).transpose(0, 1)
            for bit in range(bits):
                if time >> bit & 1:
                    held = _after(held, squares[bit])
            sums = sums + held
        return _complex(sums.transpose(0, 1)).contiguous()


def cauchy_response(
    state: Tensor, pole: Tensor, low_rank: Tensor, read: Tensor, step: Tensor, length: int
) -> Tensor:
    """States at the head of each block against readings within one; shapes as in `ops.cauchy_response`."""
    _, modes = working_dtypes(state, pole, low_rank, read, step)
    bits = length.bit_length()
    known = discrete(pole.to(modes), low_rank, torch.zeros_like(pole), step)
    with torch.autocast(state.device.type, enabled=False):
        squares = _squares(known, bits)
        first = _after(_real(state.to(modes)).transpose(0, 1), squares[0])
        heads = _chain(first, squares[bits // 2 : bits])
        readings = _chain(
            _reader(read.to(modes)).unsqueeze(1), [square.mT for square in squares[: bits // 2]]
        )
        y = torch.bmm(heads.flatten(1, 2), readings.squeeze(1).mT)
        return y.view(y.shape[0], state.shape[0], -1)[:, :, :length].permute(1, 2, 0).contiguous()
