"""The open list of probes: every way in which the Triton kernels are tried."""

from kernels.block_attention.probe import PROBES as BLOCK_ATTENTION
from kernels.channel_decay.probe import PROBES as CHANNEL_DECAY
from kernels.channel_delta.probe import PROBES as CHANNEL_DELTA
from kernels.diagonal_scan.probe import PROBES as DIAGONAL_SCAN
from kernels.linear_cross_entropy.probe import PROBES as LINEAR_CROSS_ENTROPY
from kernels.log_linear.probe import PROBES as LOG_LINEAR
from kernels.low_rank_delta.probe import PROBES as LOW_RANK_DELTA
from kernels.norm.probe import PROBES as NORM
from kernels.prefix_attention.probe import PROBES as PREFIX_ATTENTION
from kernels.probe import Probe
from kernels.routed_attention.probe import PROBES as ROUTED_ATTENTION
from kernels.scalar_decay.probe import PROBES as SCALAR_DECAY
from kernels.scalar_delta.probe import PROBES as SCALAR_DELTA
from kernels.selected_attention.probe import PROBES as SELECTED_ATTENTION
from kernels.selective_scan.probe import PROBES as SELECTIVE_SCAN
from kernels.short_convolution.probe import PROBES as SHORT_CONVOLUTION
from kernels.softmax_attention.probe import PROBES as SOFTMAX_ATTENTION
from kernels.trapezoid.probe import PROBES as TRAPEZOID
from kernels.window_mass.probe import PROBES as WINDOW_MASS

PROBES: tuple[Probe, ...] = (
    *BLOCK_ATTENTION,
    *CHANNEL_DECAY,
    *CHANNEL_DELTA,
    *DIAGONAL_SCAN,
    *LINEAR_CROSS_ENTROPY,
    *LOG_LINEAR,
    *LOW_RANK_DELTA,
    *NORM,
    *PREFIX_ATTENTION,
    *ROUTED_ATTENTION,
    *SCALAR_DECAY,
    *SCALAR_DELTA,
    *SELECTED_ATTENTION,
    *SELECTIVE_SCAN,
    *SHORT_CONVOLUTION,
    *SOFTMAX_ATTENTION,
    *TRAPEZOID,
    *WINDOW_MASS,
)


def probes_of(operator: str) -> tuple[Probe, ...]:
    """All probes of one operator."""
    return tuple(probe for probe in PROBES if probe.operator == operator)
