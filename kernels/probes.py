"""The open list of probes: every way in which the Triton kernels are tried."""

from kernels.channel_decay.probe import PROBES as CHANNEL_DECAY
from kernels.linear_cross_entropy.probe import PROBES as LINEAR_CROSS_ENTROPY
from kernels.norm.probe import PROBES as NORM
from kernels.probe import Probe
from kernels.scalar_decay.probe import PROBES as SCALAR_DECAY
from kernels.scalar_delta.probe import PROBES as SCALAR_DELTA

PROBES: tuple[Probe, ...] = (
    *CHANNEL_DECAY,
    *LINEAR_CROSS_ENTROPY,
    *NORM,
    *SCALAR_DECAY,
    *SCALAR_DELTA,
)


def probes_of(operator: str) -> tuple[Probe, ...]:
    """All probes of one operator."""
    return tuple(probe for probe in PROBES if probe.operator == operator)
