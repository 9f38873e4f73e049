"""Whoever looks at a study waits for what is read, not for what trains one: commands that look load nothing heavy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "ray", "triton")
LOADED = f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
# A server that says what was loaded by the time it would begin to serve, and does not.
SERVE = f"uvicorn.Server.run = lambda *_, **__: {LOADED}\n"


def after(arguments, before=""):
    """What of the heavy packages a command has loaded at its end."""
    code = f"import json, sys\n{before}from nas.cli.main import main\nmain({arguments!r})\n{'' if before else LOADED}\n"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(next(line for line in done.stdout.splitlines()[::-1] if line.startswith("[")))


@pytest.mark.parametrize(
    "arguments",
    [
        ["trials", "--study", "quick"],
        ["trials", "--study", "nope"],
        ["show", "6", "--study", "quick"],
        ["retry", "--study", "quick"],
        ["db", "check"],
    ],
    ids=" ".join,
)
def test_a_command_that_looks_loads_nothing_heavy(url, arguments):
    assert after([*arguments, "--storage", url]) == []


def test_the_dashboard_is_served_without_anything_heavy(url):
    arguments = ["dashboard", "--storage", url, "--study", "quick", "--port", "0", "--no-browser"]
    assert after(arguments, f"import uvicorn\n{SERVE}") == []
