"""Every shipped configuration is compiled for two architectures, fits their shared memory and spills nothing."""

import json
import os
import subprocess
import sys

import pytest

from kernels.compile import ARCHITECTURES, SHARED_BYTES
from kernels.configurations import table
from kernels.probes import PROBES

OPERATORS = sorted({probe.operator for probe in PROBES})
WIDE_PRODUCTS = "nearly exact products of more than 128 keys with the state"
WIDE_KEYS = "256 channels of a state and of keys in two TF32 numbers each do not fit; on an H100 128 do"
SPLIT = "at the widest the parts into which one float32 operand is split for tensor cores fill the registers"
SPILLS: dict[tuple[str, str, str], tuple[int, str]] = {
    ("channel_decay", "backward", "float32"): (472, WIDE_PRODUCTS),
    ("channel_decay", "forward", "float32"): (536, WIDE_PRODUCTS),
    ("channel_delta", "forward", "float32"): (6000, WIDE_KEYS),
    ("channel_delta", "backward", "float32"): (9500, WIDE_KEYS),
    ("scalar_delta", "forward", "float32"): (7000, WIDE_KEYS),
    ("scalar_delta", "backward", "float32"): (1500, WIDE_KEYS),
    **{
        (operator, kernel, "float32"): (most, SPLIT)
        for operator in ("block_attention", "prefix_attention", "routed_attention")
        for kernel, most in (("forward", 16), ("backward_queries", 96), ("backward_keys", 240))
    },
    ("low_rank_delta", "backward", "float32"): (
        248,
        "nearly exact products of more than 64 keys with the state",
    ),
    ("low_rank_delta", "forward", "float32"): (
        288,
        "nearly exact products of more than 64 keys with the state",
    ),
    ("low_rank_delta", "pairs_backward", "float32"): (32, "nearly exact products, even at the fewest keys"),
    **{
        (operator, kernel, "float32"): (most, SPLIT)
        for operator in ("softmax_attention", "window_mass")
        for kernel, most in (("forward", 24), ("backward_queries", 88), ("backward_keys", 136), ("step", 48))
    },
}
"""(operator, kernel, type) → bytes that it may spill, and why."""


def compiled(operator, *options):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.compile", "--operator", operator, *options]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(operator, architecture, dtypes, *options):
    """All rows of an operator in some types; its kernels must all be among them."""
    rows = compiled(
        operator, "--architecture", architecture, *(f"--dtype={dtype}" for dtype in dtypes), *options
    )
    for row in rows:
        assert row["shared_bytes"] <= SHARED_BYTES[architecture], row
        allowed, _ = SPILLS.get((operator, row["kernel"], row["dtype"]), (0, ""))
        assert row["spilled_bytes"] <= allowed, row
    assert {row["kernel"] for row in rows} == {row.kernel for row in table(operator)}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_configuration_fits(operator, architecture):
    # Half precision is what training uses, and compiles in half the time of float32's split products.
    check(operator, architecture, ("bfloat16",))


@pytest.mark.exhaustive
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_configuration_fits_in_float32(operator):
    check(operator, "sm_90", ("float32",))


@pytest.mark.exhaustive
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_configuration_fits_with_every_option(operator, architecture):
    check(operator, architecture, ("bfloat16", "float16"), "--every")
