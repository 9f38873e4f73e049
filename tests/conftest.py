"""What all tests share: Triton's interpreter where there is no GPU, and a PostgreSQL server of our own."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.postgres import Server, server_binaries

# Before anything imports Triton, so that every test of a kernel can run.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:
    # The operators' tests ask torch for deterministic algorithms, which cuBLAS grants with a workspace of its own alone.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    binaries = server_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server (initdb, postgres) on this machine")
    home = Path(tempfile.mkdtemp(prefix="nas-pg-"))  # short, as a socket's path must be, and open to its user
    running = Server(binaries, home)
    try:
        yield running
    finally:
        running.stop()
        shutil.rmtree(home)


@pytest.fixture(params=["sqlite-file", "postgresql"])
def shared_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind that several processes can open."""
    if request.param == "postgresql":
        running: Server = request.getfixturevalue("server")
        return running.new_database()
    return f"sqlite:///{tmp_path}/nas.db"
