"""Every shipped configuration is compiled, half precision for two architectures, fits their shared memory and spills nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from kernels.compile import ARCHITECTURES, SHARED_BYTES, Footprint, footprints, shipped
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
    ("log_linear", "forward_delta", "float32"): (32, "eight numbers, on an A100 alone"),
    ("low_rank_delta", "forward", "float32"): (8, "two numbers, on an H100 alone"),
    ("low_rank_delta", "backward", "float32"): (8, "two numbers, on an A100 alone"),
    ("low_rank_delta", "pairs_backward", "float32"): (32, "eight numbers, even at the fewest keys"),
    ("softmax_attention", "step", "float32"): (8, "two numbers, at any number of slots"),
}
"""(operator, kernel, type) → bytes that it may spill, and why."""
OPTION_SPILLS = SPILLS | {
    ("softmax_attention", "backward_queries", "float32"): (
        16,
        "four numbers with one option, on an H100 alone; half the keys spill none",
    ),
    ("softmax_attention", "step", "float32"): (48, "twelve numbers with one option; more with other warps"),
}
"""The same where every option is compiled: seldom used ones may spill more than those that are found first."""


@pytest.fixture(scope="module")
def apart() -> Iterator[ProcessPoolExecutor]:
    """One process that compiles for all tests here: Triton interprets in this one, and importing it takes seconds."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TRITON_INTERPRET", raising=False)
            pool.submit(torch.set_num_threads, 1).result()
        yield pool


def check(operator, rows, spills=SPILLS):
    """Rows of an operator; its kernels must all be among them."""
    for row in rows:
        assert row.shared_bytes <= SHARED_BYTES[row.architecture], row
        allowed, _ = spills.get((operator, row.kernel, row.dtype), (0, ""))
        assert row.spilled_bytes <= allowed, row
    assert {row.kernel for row in rows} == {row.kernel for row in table(operator)}


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_configuration_fits(operator, apart):
    check(operator, apart.submit(shipped, operator).result())


def test_the_program_prints_what_it_compiled():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.compile", "--operator=norm", "--architecture=sm_90"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    check("norm", [Footprint(**json.loads(line)) for line in run.stdout.splitlines()])


@pytest.mark.exhaustive
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_configuration_fits_with_every_option(operator, architecture, apart):
    dtypes = ("bfloat16", "float16", "float32")
    rows = apart.submit(footprints, operator, architecture, dtypes, every=True).result()
    check(operator, rows, OPTION_SPILLS)
