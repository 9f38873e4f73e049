"""The built wheel: what is in it, and that its `nas` runs where the sources are not."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import nas

ROOT = Path(next(iter(nas.__path__))).parent
PACKAGES = ("nas", "search_space", "kernels", "trainers", "storage", "dashboards")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="no README.md yet, which the wheel shows"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the sources, made in another place so that nothing is left in theirs."""
    place = tmp_path_factory.mktemp("sources")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"],
        cwd=place,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [made] = (place / "dist").glob("*.whl")
    return made


def test_it_holds_every_module_and_every_page_and_no_test(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected
    assert any(name.startswith("dashboards/templates/") for name in names)
    assert any(name.startswith("dashboards/static/") for name in names)


def test_it_runs_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)],
        check=True,
        capture_output=True,
        # With the sources on its path pip takes the package for installed.
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    # The libraries are those of the present environment; its own way to the sources is not followed from a .pth file.
    site = next((home / "lib").glob("python*")) / "site-packages"
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> str:
        done = subprocess.run(list(arguments), cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(
        str(python), "-c", "import nas.cli, dashboards.assets as a; print(nas.cli.__file__, a.__file__)"
    )
    assert all(path.startswith(str(site)) for path in where.split())
    command = str(home / "bin" / "nas")
    assert "Usage: nas" in run(command, "--help")
    answer = json.loads(run(command, "cost", "kda", "--json"))
    assert answer["layers"] == 1 and answer["params"] > 0
