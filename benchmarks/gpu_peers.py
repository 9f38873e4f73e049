"""What a user would otherwise run on a GPU, where it is installed: SDPA, flex_attention, fla, Liger, torch's own.

Letters: B batch, T time, H heads, K key, V value.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.probe import Inputs, Probe

Run = Callable[[], tuple[Tensor, ...]]


def peers_of(probe: Probe, x: Inputs) -> dict[str, Run]:
    """The peers of a probe's operator on these inputs, by name; only of plain calls, which they can answer."""
    build = PEERS.get(probe.operator)
    return build(x) if build is not None else {}


def _installed(path: str, name: str) -> Callable[..., Any] | None:
    """A function of another project's, None where it is not installed or has none of this name."""
    if find_spec(path.partition(".")[0]) is None:
        return None
    try:
        found: Callable[..., Any] = getattr(import_module(path), name)
    except (ImportError, AttributeError):
        return None
    return found


@cache
def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    return compiled


def _attention(x: Inputs) -> dict[str, Run]:
    from torch.nn.attention.flex_attention import create_block_mask

    def heads_first() -> tuple[Tensor, Tensor, Tensor]:
        return x["q"].transpose(1, 2), x["k"].transpose(1, 2), x["v"].transpose(1, 2)

    def sdpa() -> tuple[Tensor, ...]:
        q, k, v = heads_first()
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return (output.transpose(1, 2),)

    peers: dict[str, Run] = {"sdpa": sdpa}
    if x["q"].device.type == "cuda":
        time = x["q"].shape[1]
        mask = create_block_mask(lambda _b, _h, i, j: i >= j, None, None, time, time, device="cuda")
        peers["flex_attention"] = lambda: (
            _flex()(*heads_first(), block_mask=mask, enable_gqa=True).transpose(1, 2),
        )
    return peers


def _scalar_decay(x: Inputs) -> dict[str, Run]:
    run = _installed("fla.ops.simple_gla", "chunk_simple_gla")
    if run is None or x["q"].shape[2] != x["v"].shape[2]:
        return {}
    named = {"g": x["log_decay"], "scale": 1.0, "initial_state": x["state"], "output_final_state": True}
    return {"fla": lambda: run(x["q"], x["k"], x["v"], **named)}


def _channel_decay(x: Inputs) -> dict[str, Run]:
    run = _installed("fla.ops.gla", "chunk_gla")
    if run is None:
        return {}
    named = {"g": x["log_decay"], "scale": 1.0, "initial_state": x["state"], "output_final_state": True}
    return {"fla": lambda: run(x["q"], x["k"], x["v"], **named)}


def _scalar_delta(x: Inputs) -> dict[str, Run]:
    run = _installed("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
    if run is None or x["q"].shape[2] != x["v"].shape[2]:
        return {}
    named = {"scale": 1.0, "initial_state": x["state"], "output_final_state": True}
    return {"fla": lambda: run(x["q"], x["k"], x["v"], g=x["log_decay"], beta=x["beta"], **named)}


def _channel_delta(x: Inputs) -> dict[str, Run]:
    run = _installed("fla.ops.kda", "chunk_kda")
    if run is None:
        return {}
    named = {"scale": 1.0, "initial_state": x["state"], "output_final_state": True}
    return {"fla": lambda: run(x["q"], x["k"], x["v"], g=x["log_decay"], beta=x["beta"], **named)}


def _low_rank_delta(x: Inputs) -> dict[str, Run]:
    run = _installed("fla.ops.rwkv7", "chunk_rwkv7")
    if run is None:
        return {}
    inputs = (x["q"], x["log_decay"], x["k"], x["v"], x["a"], x["b"])
    return {"fla": lambda: run(*inputs, initial_state=x.get("state"), output_final_state=True)}


def _norm(x: Inputs) -> dict[str, Run]:
    if "gate" not in x or "weight" not in x:
        return {}
    width = (x["x"].shape[-1],)
    peers: dict[str, Run] = {
        "torch": lambda: (F.rms_norm(x["x"], width, x["weight"].to(x["x"]), 1e-5) * F.silu(x["gate"]),)
    }
    run = _installed("liger_kernel.transformers.functional", "liger_rms_norm")
    if run is not None:
        # Its gate would be a second kernel; not in place, since the benchmark hands it the same inputs again.
        peers["liger"] = lambda: (
            run(x["x"], x["weight"].to(x["x"]), 1e-5, in_place=False) * F.silu(x["gate"]),
        )
    return peers


def _linear_cross_entropy(x: Inputs) -> dict[str, Run]:
    if x["x"].dim() != 2:
        return {}
    inputs = (x["x"], x["weight"], x["targets"])
    peers: dict[str, Run] = {"torch": lambda: (F.cross_entropy(x["x"] @ x["weight"].T, x["targets"]),)}
    run = _installed("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    if run is not None:
        peers["liger"] = lambda: (run(*inputs),)
    return peers


def _convolution(x: Inputs) -> dict[str, Run]:
    def conv1d() -> tuple[Tensor, ...]:
        seen = torch.cat([x["tail"], x["x"]], dim=1).transpose(1, 2)
        y = F.conv1d(
            seen, x["weight"][:, None].to(seen.dtype), x["bias"].to(seen.dtype), groups=seen.shape[1]
        )
        return (F.silu(y).transpose(1, 2),)

    return {"conv1d": conv1d}


PEERS: dict[str, Callable[[Inputs], dict[str, Run]]] = {
    "softmax_attention": _attention,
    "scalar_decay": _scalar_decay,
    "channel_decay": _channel_decay,
    "scalar_delta": _scalar_delta,
    "channel_delta": _channel_delta,
    "low_rank_delta": _low_rank_delta,
    "norm": _norm,
    "linear_cross_entropy": _linear_cross_entropy,
    "short_convolution": _convolution,
}
