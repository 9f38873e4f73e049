"""How far a Triton kernel is from its reference: outputs and gradients of a probe, by relative RMS.

Bounds after what rounding explains in half precision; sums of many terms, such as gradients of gates, get more room.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import Backend
from kernels.probe import Inputs, Probe, Sizes, cast, converted, differentiable, noise, token_of

BOUNDS = {"output": 5e-3, "gradient": 8e-3, "loose": 2e-2}
"""Of float16 and bfloat16."""
EXACT = 1e-5
"""Of float32, where tensor cores do not round it to TF32."""
FLOOR = 1e-4
"""An expectation whose RMS is below this is compared as if it were so large: it is noughts up to rounding."""
SEED = 7


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """One output or gradient: its relative error and what it may be; NaN is infinitely far."""

    name: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        """Whether it is near enough."""
        return self.error <= self.bound


def deviations(probe: Probe, sizes: Sizes, dtype: torch.dtype, device: torch.device | str) -> list[Deviation]:
    """Every output and gradient of a probe, and its step's outputs, in Triton beside the reference in float64."""
    drawn = cast(probe, probe.draw(sizes, torch.Generator().manual_seed(SEED)), dtype, device)
    expected = results(probe, "reference", drawn, torch.float64)
    actual = results(probe, "triton", drawn)
    return [
        Deviation(name=name, error=distance(actual[name], value), bound=_bound(probe, name, dtype))
        for name, value in expected.items()
    ]


def results(
    probe: Probe, backend: Backend, inputs: Inputs, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Outputs, gradients for arbitrary cotangents, and a step's outputs, by name; computed in `dtype` if one is given."""
    leaves = {
        name: converted(x.detach(), dtype or x.dtype).requires_grad_(probe.backward)
        if differentiable(x)
        else x
        for name, x in inputs.items()
    }
    outputs = probe.call(backend, leaves)
    found = {f"output {place}": x.detach() for place, x in enumerate(outputs)}
    if probe.backward:
        asked = [x for x in outputs if x.requires_grad]
        # Another seed than that of the inputs: along x itself a norm has no gradient at all.
        draws = torch.Generator().manual_seed(SEED + 1)
        cotangents = [noise(x, draws) for x in asked]
        named = {name: x for name, x in leaves.items() if x.requires_grad}
        gradients = torch.autograd.grad(asked, list(named.values()), cotangents, allow_unused=True)
        for (name, x), gradient in zip(named.items(), gradients, strict=True):
            found[f"gradient of {name}"] = torch.zeros_like(x) if gradient is None else gradient
    if probe.step is not None:
        with torch.no_grad():
            stepped = probe.step(backend, token_of(probe, leaves))
        found.update({f"output {place} of a step": x for place, x in enumerate(stepped)})
    return found


def distance(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over the RMS of what is expected; infinite where something is not finite.

    Whole numbers are equal or infinitely far apart.
    """
    if not differentiable(expected):
        return 0.0 if torch.equal(actual, expected) else float("inf")
    wide, right = converted(actual, torch.float64), converted(expected, torch.float64)
    if not bool(wide.isfinite().all()):
        return float("inf")
    size = max(right.abs().square().mean().sqrt().item(), FLOOR)
    return (wide - right).abs().square().mean().sqrt().item() / size


def _bound(probe: Probe, name: str, dtype: torch.dtype) -> float:
    if dtype == torch.float32:
        return EXACT
    if name.removeprefix("gradient of ") in probe.loose:
        return BOUNDS["loose"]
    return BOUNDS["gradient" if name.startswith("gradient") else "output"]
