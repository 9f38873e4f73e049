"""The GPU benchmark runs where there is none, at toy sizes in the interpreter, and gives no time to what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from benchmarks.gpu_operators import check, plan
from benchmarks.gpu_peers import PEERS, peers_of
from kernels.probe import Sizes
from kernels.probes import PROBES, probes_of

ROOT = Path(next(iter(kernels.__path__))).parent


def test_it_runs_in_the_interpreter(tmp_path):
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--toy", "--output", str(output)]
    run = subprocess.run(
        [*command, "--operator", "scalar_decay"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    measured = json.loads(output.read_text())
    assert (measured["device"], measured["toy"]) == ("interpreter", True)
    assert {row["probe"].split(":")[0] for row in measured["checks"]} == {"scalar_decay"}
    assert all(row["ok"] and row["worst"]["error"] <= row["worst"]["bound"] for row in measured["checks"])
    assert {row["phase"] for row in measured["times"]} == {"forward", "forward and backward", "step"}
    for row in measured["times"]:
        assert row["triton"]["eager_ms"] > 0
        assert row["chunked"]["eager_ms"] > 0
    modes = {row["mode"]: row for row in measured["training"]}
    assert len(modes) == 5
    assert all(row["tokens_per_s"] > 0 for row in modes.values())
    # All ways of training see the same batches and end alike.
    alone = modes["triton, eager"]["loss"]
    assert abs(modes["chunked, eager"]["loss"] - alone) < 1e-3
    assert abs(modes["triton, replayed"]["losses"][0] - modes["triton, 4 stacked"]["losses"][0]) < 1e-3


def test_what_fails_its_check_gets_no_time():
    program = """
import benchmarks.gpu_operators as gpu
import torch
from kernels.check import Deviation
gpu.deviations = lambda *_: [Deviation(name="output 0", error=1.0, bound=0.1)]
device = torch.device("cpu")
calls = gpu.plan(["scalar_decay"], device, toy=True)
checks = gpu.check(calls, device, lambda: 100.0)
assert checks and not any(row["ok"] for row in checks)
good = {row["probe"] for row in checks if row["ok"]}
assert gpu.times(calls, good, device, lambda: 100.0, None) == []
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)


@pytest.mark.parametrize("operator", sorted({probe.operator for probe in PROBES} & set(PEERS)))
def test_peers_compute_the_same(operator, near):
    """Of the peers those that torch brings, on the CPU; of the probe that is timed."""
    probe = probes_of(operator)[0]
    drawn = probe.draw(Sizes(time=20, batch=2), torch.Generator().manual_seed(0))
    expected = probe.call("reference", drawn)[0]
    for name, run in peers_of(probe, drawn).items():
        if name in ("torch", "sdpa", "conv1d"):
            near(run()[0], expected, name=name)


@pytest.mark.parametrize("operator", sorted({probe.operator for probe in PROBES}))
def test_every_operator_is_checked_as_it_will_be_on_a_gpu(operator):
    """A check that fails for a reason of its own would take the operator's times from the table."""
    device = torch.device("cpu")
    calls = [call for call in plan([operator], device, toy=True) if not call.timed]
    assert {call.probe.id for call in calls} == {probe.id for probe in probes_of(operator)}
    assert [row for row in check(calls, device, lambda: 100.0) if not row["ok"]] == []
