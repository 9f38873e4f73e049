"""Distillation of long filters into few modes, so that a trained Hyena decodes by a recurrence and not by a cache.

Letters: C channels, L taps, M modes, n rows of a Hankel matrix, r its rank that is kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from search_space.filters import ImplicitFilters, ModalFilters, unit_energy
from search_space.mixers.hyena import Hyena, HyenaMixer
from search_space.modes import SLOW

LEAST_POLE = 0.05
LEAST_DECAY = 1e-8
ROUNDING = 1e-7
CANCELLED = 1e-6
"""Residues of poles that lie together may be large and cancel; what only such a sum could add is left out."""


@dataclass(frozen=True, kw_only=True)
class Modal:
    """h_t ≈ 2 Re Σ residue · exp(t · log_pole), and at t = 0 `direct` besides. [C, M] complex128, [C] float64."""

    log_pole: Tensor
    residue: Tensor
    direct: Tensor

    def taps(self, length: int) -> Tensor:
        """The filter that it stands for, [C, L]."""
        powers = (self.log_pole.unsqueeze(-1) * torch.arange(length)).exp()
        taps = 2 * (self.residue.unsqueeze(-1) * powers).real.sum(1)
        taps[:, 0] += self.direct
        return taps


def _hankel(filters: Tensor) -> Tensor:
    """[C, n, n] float64 of h_1, h_2, …: the first tap needs no state."""
    taps = filters.double()[:, 1:]
    rows = (taps.shape[1] + 1) // 2
    square: Tensor = taps[:, : 2 * rows - 1].unfold(1, rows, 1)
    return square


def hankel_values(filters: Tensor) -> Tensor:
    """[C, L] → [C, n], falling: no recurrence of r real numbers comes nearer to a filter's Hankel matrix than the r-th.

    Counted from 0, in the norm of the matrix (Adamjan, Arov and Krein 1971).
    """
    values: Tensor = torch.linalg.eigvalsh(_hankel(filters)).abs()
    return values.sort(dim=-1, descending=True).values


def _poles(observed: Tensor, modes: int) -> Tensor:
    """At most M poles, one of each pair, from orthogonal directions of what a state shows over time, [n, r]."""
    for rank in range(observed.shape[1], 0, -1):
        shift = torch.linalg.lstsq(observed[:-1, :rank], observed[1:, :rank], driver="gelsd").solution
        found = torch.linalg.eigvals(shift)
        # A real pole takes a mode of its own, so that fewer than 2M numbers of state may have to do.
        found = found[found.imag >= 0]
        if len(found) <= modes:
            break
    # A filter that ends before it has faded may look as if it grew: such a mode is held where it neither grows nor fades.
    return torch.polar(found.abs().clamp(LEAST_POLE, 1), found.angle())


def _residues(taps: Tensor, poles: Tensor) -> Tensor:
    """The residues with which the poles come nearest to h_1, h_2, … in squares."""
    time = torch.arange(1, len(taps), dtype=torch.float64).unsqueeze(-1)
    powers = (time * poles.log()).exp()
    basis = 2 * torch.cat([powers.real, -powers.imag], dim=1)
    found = torch.linalg.lstsq(basis, taps[1:, None], driver="gelsd", rcond=CANCELLED).solution.squeeze(-1)
    return torch.complex(*found.chunk(2))


def distil(filters: Tensor, modes: int) -> Modal:
    """Few modes for filters [C, L] after Kung 1978, as LaughingHyena (arXiv:2310.18780) does it.

    The leading eigenvectors of the Hankel matrix show what a state would be seen to do; how they move in a step holds
    the poles, and residues follow by least squares. Unused modes have no residue. The work grows with L³ a channel.

    Raises:
        ValueError: there are fewer than five taps, or no mode.
    """
    if modes < 1 or filters.dim() != 2 or filters.shape[1] < 5:
        raise ValueError(
            f"filters of shape {list(filters.shape)} and {modes} modes cannot be distilled: give [C, L] with at least "
            "five taps, and at least one mode"
        )
    filters = filters.detach().double().cpu()
    values, vectors = torch.linalg.eigh(_hankel(filters))
    # Half as many as there are rows: more, and a step in time is no longer told by the rows that are left.
    most = min(2 * modes, values.shape[1] // 2)
    order = values.abs().argsort(dim=-1, descending=True)[:, :most]
    log_pole = torch.full((len(filters), modes), -1, dtype=torch.complex128)
    residue = torch.zeros_like(log_pole)
    for channel, taps in enumerate(filters):
        leading = order[channel]
        sizes = values[channel][leading].abs()
        leading = leading[sizes > ROUNDING * sizes[0]]
        if not len(leading):
            continue
        poles = _poles(vectors[channel][:, leading], modes)
        log_pole[channel, : len(poles)] = poles.log()
        residue[channel, : len(poles)] = _residues(taps, poles)
    return Modal(log_pole=log_pole, residue=residue, direct=filters[:, 0] - 2 * residue.real.sum(-1))


@torch.no_grad()
def distil_hyena(mixer: HyenaMixer, modes: int, length: int) -> HyenaMixer:
    """A modal mixer for one with implicit filters, whose first `length` taps it follows; what they begin with is skipped.

    Raises:
        ValueError: the mixer's filters are modal already, or the number of modes is no option.
    """
    if not isinstance(mixer.filters, ImplicitFilters):
        raise ValueError("only a hyena with filter=implicit can be distilled: this one's filters are modal")
    spec = Hyena(
        filter="modal", order=len(mixer.skip) + 1, groups=mixer.sizes[0] // mixer.sizes[1], modes=modes
    )
    made = HyenaMixer(spec, mixer.frame).to(mixer.skip.device)
    own = {name: weight for name, weight in mixer.state_dict().items() if not name.startswith("filters.")}
    made.load_state_dict(own, strict=False)
    assert isinstance(made.filters, ModalFilters)
    for number, taps in enumerate(mixer.filters.taps(0, length)):
        modal = distil(taps, modes)
        decay = (-modal.log_pole.real).clamp(min=LEAST_DECAY)
        made.filters.rate[number] = decay.log() / SLOW
        made.filters.angle[number] = modal.log_pole.imag / SLOW
        made.filters.residue[number] = torch.view_as_real(modal.residue / unit_energy(decay))
        made.skip[number] += modal.direct.to(made.skip)
    return made
