"""`nas warm`, `nas tune`, and what the doctor says of the kernels."""

import json
import os
import subprocess
import sys

import pytest
import torch

from kernels.probes import PROBES
from nas.cli.main import main
from nas.config import resolve
from nas.doctor import examine
from nas.plan import make_plan
from nas.warm import distinct_jobs

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what there is without a GPU")
SMALL = ["--set", "proxy.width=16", "--set", "proxy.length=16", "--set", "target.width=64"]


@NO_GPU
def test_the_doctor_says_which_backend_and_why(tmp_path):
    (found,) = (
        item for item in examine(f"sqlite:///{tmp_path}/none.db", with_ray=False) if item.check == "kernels"
    )
    operators = len({probe.operator for probe in PROBES})
    assert found.ok
    assert (
        found.said == f"chunked PyTorch: torch sees no GPU; {operators} operators have Triton kernels for one"
    )


def warm(*arguments, interpret=False):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "nas.cli.main", "warm", *SMALL, *arguments]
    program = "import sys; from nas.cli.main import run; sys.argv = ['nas', *sys.argv[1:]]; run()"
    return subprocess.run(
        [sys.executable, "-c", program, *command[3:]],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_kernels_of_a_space_are_compiled_without_a_gpu():
    run = warm("--space", "retnet", "--architecture", "sm_90", "--processes", "1", "--json")
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    assert answer["architecture"] == "sm_90"
    assert answer["layers"]
    assert all(layer["kernels"] >= 2 and layer["seconds"] > 0 for layer in answer["layers"])


@NO_GPU
@pytest.mark.parametrize(
    ("arguments", "interpret", "message"),
    [
        ([], False, "torch sees no GPU here"),
        (["--architecture", "hopper"], False, "--architecture 'hopper' is not one of sm_80"),
        (["--architecture", "sm_90"], True, "TRITON_INTERPRET is set"),
        (["--architecture", "sm_90", "--space", "retnett"], False, "retnet"),
    ],
)
def test_what_cannot_be_compiled_is_named(arguments, interpret, message):
    run = warm(*arguments, interpret=interpret)
    assert run.returncode == 2
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == ""


def test_layers_whose_proxies_are_alike_are_compiled_once():
    plan = make_plan(resolve({"space": {"mixers": ["full", "window"]}}))
    jobs = distinct_jobs(plan)
    assert len({str(job.layers) for job in jobs}) == len(jobs) <= len(plan.space.alphabet) + len(plan.starts)
    assert all(len(job.layers) == 2 for job in jobs)


@NO_GPU
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operator", "full"], "--operator 'full' has no Triton kernel; those that have are"),
        (["--dtype", "float64"], "--dtype 'float64' is not one of"),
        (["--device", "cuda"], "device 'cuda' cannot be used here"),
    ],
)
def test_what_cannot_be_tuned_is_named(arguments, message, capsys):
    assert main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err
