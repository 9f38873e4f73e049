"""Every shipped configuration is compiled, half precision for two architectures, fits their shared memory and spills nothing."""

import json
import os
import subprocess
import sys

import pytest

from kernels.compile import SHARED_BYTES
from kernels.configurations import table
from kernels.probes import PROBES

OPERATORS = sorted({probe.operator for probe in PROBES})
SPILLS: dict[tuple[str, str, str], tuple[int, str]] = {
    **{
        (operator, "backward_keys", "float32"): (
            16,
            "two to four numbers of three products, at any tile's size",
        )
        for operator in ("block_attention", "routed_attention")
    },
    ("low_rank_delta", "forward", "float32"): (8, "two numbers, on an H100 alone"),
    ("low_rank_delta", "backward", "float32"): (8, "two numbers, on an A100 alone"),
    ("low_rank_delta", "pairs_backward", "float32"): (32, "eight numbers, even at the fewest keys"),
    ("softmax_attention", "step", "float32"): (8, "two numbers, at any number of slots"),
}
"""(operator, kernel, type) → bytes that it may spill, and why."""


def compiled(operator, *options):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.compile", "--operator", operator, *options]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(operator, *options):
    """Rows of an operator; its kernels must all be among them."""
    rows = compiled(operator, *options)
    for row in rows:
        assert row["shared_bytes"] <= SHARED_BYTES[row["architecture"]], row
        allowed, _ = SPILLS.get((operator, row["kernel"], row["dtype"]), (0, ""))
        assert row["spilled_bytes"] <= allowed, row
    assert {row["kernel"] for row in rows} == {row.kernel for row in table(operator)}


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_configuration_fits(operator):
    check(operator, "--shipped")


@pytest.mark.exhaustive
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_configuration_fits_with_every_option(operator):
    check(operator, "--dtype=bfloat16", "--dtype=float16", "--dtype=float32", "--every")
