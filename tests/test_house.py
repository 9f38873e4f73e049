"""The house itself: its rooms, their cards, their sizes, what may be imported where, and no litter."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("nas", "search_space", "kernels", "trainers", "storage", "dashboards")
ENTRIES = {
    "pyproject.toml", *PACKAGES, "tests", "README.md", "Makefile", "constraints.txt", "benchmarks", "deploy", "LICENSE",
}  # fmt: skip
MOST_LINES = 400
MOST_LINES_OF = {
    "search_space/mixers": 200,
    "search_space/channel": 200,
    "trainers/tasks": 200,
    "dashboards/pages.py": 200,
}
LARGER: dict[str, int] = {}
"""Files that are longer than they should be, and how long they are: a number here may only fall."""


@cache
def tracked() -> tuple[str, ...]:
    """Files that are in the repository or about to be."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git repository here")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return tuple(name for name in names if (ROOT / name).is_file())


def texts() -> dict[str, str]:
    found = {}
    for name in tracked():
        try:
            found[name] = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return found


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def python(code: str, *, cwd: Path = ROOT) -> str:
    """Runs a few lines in a fresh interpreter and gives what they print."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(cwd), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_top_level_holds_what_it_should_and_nothing_else() -> None:
    entries = {name.split("/")[0] for name in tracked()}
    assert {name for name in entries if not name.startswith(".")} <= ENTRIES
    assert set(PACKAGES) <= entries


def test_every_folder_of_code_is_a_package_whose_card_is_one_docstring() -> None:
    folders = {path.parent for path in modules()}
    for folder in folders:
        assert (folder / "__init__.py").exists(), f"{folder} has no __init__.py"
        body = ast.parse((folder / "__init__.py").read_text()).body
        assert len(body) == 1 and isinstance(body[0], ast.Expr), (
            f"{folder}/__init__.py holds more than a card"
        )
        card = body[0].value
        assert isinstance(card, ast.Constant) and isinstance(card.value, str) and len(card.value) > 20


def most_lines(name: str) -> int:
    limits = [most for place, most in MOST_LINES_OF.items() if name.startswith(place)]
    return limits[0] if limits else MOST_LINES


def test_no_file_outgrows_its_limit() -> None:
    for path in modules():
        name = path.relative_to(ROOT).as_posix()
        lines = len(path.read_text().splitlines())
        if path.name == "triton.py":
            continue
        if name in LARGER:
            assert lines <= LARGER[name], f"{name} grew from {LARGER[name]} to {lines} lines: split it"
        else:
            assert lines <= most_lines(name), (
                f"{name} has {lines} lines, at most {most_lines(name)} are allowed"
            )


def test_the_exceptions_are_still_needed() -> None:
    for name, most in LARGER.items():
        assert (ROOT / name).exists(), f"{name} is gone: take it from the table"
        assert len((ROOT / name).read_text().splitlines()) > most_lines(name), f"{name} is small enough now"
        assert most > most_lines(name)


def test_packages_in_the_wheel_are_exactly_the_six() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(settings["tool"]["importlinter"]["root_packages"]) == set(PACKAGES)
    assert settings["tool"]["setuptools"]["packages"]["find"]["include"] == [f"{name}*" for name in PACKAGES]
    assert set(settings["tool"]["mypy"]["packages"]) == {*PACKAGES, "benchmarks"}
    assert settings["project"]["version"] == importlib.metadata.version(settings["project"]["name"])
    assert settings["project"]["scripts"] == {"nas": "nas.cli.main:run"}
    for name in ("templates", "static"):
        kept = settings["tool"]["setuptools"]["package-data"]["dashboards"]
        assert any(pattern.startswith(f"{name}/") for pattern in kept)


HEAVY = ("torch", "ray", "optuna", "triton")
LOADED = f"import json, sys; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"


def test_the_dashboard_loads_without_torch_ray_or_optuna() -> None:
    assert json.loads(python(f"import dashboards.app, dashboards.report; {LOADED}")) == []


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["search", "--help"], ["dashboard", "--help"], ["explain", "--help"], ["submit", "--help"]],
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    lines = python(f"from nas.cli.main import main\nassert main({arguments!r}) == 0\n{LOADED}").splitlines()
    assert "Usage: nas" in "\n".join(lines) and json.loads(lines[-1]) == []
    light = "import json, sys\nfrom nas.cli.main import main\nmain(['--help'])\n"
    light += "print(json.dumps([n for n in ('pandas', 'plotly', 'pydantic', 'fastapi') if n in sys.modules]))"
    assert json.loads(python(light).splitlines()[-1]) == []


ALONE = """
import importlib, pkgutil, sys
REFUSED = {refused!r}
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"{{name}} is not to be needed here", name=name)
sys.meta_path.insert(0, Nothing())
for package in {packages!r}:
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if not found.name.endswith(".triton"):
            importlib.import_module(found.name)
            print(found.name)
"""
FOREIGN = {"optuna", "ray", "sqlalchemy", "alembic", "pydantic", "typer", "plotly", "pandas", "fastapi", "transformers", "rich", "yaml", "moocore"}  # fmt: skip


@pytest.mark.parametrize(
    ("packages", "refused", "least"),
    [
        (("kernels", "search_space", "trainers"), FOREIGN, 40),
        (("search_space",), FOREIGN | {"trainers", "nas", "storage", "dashboards"}, 20),
        (("kernels",), FOREIGN | {"search_space", "trainers", "nas", "storage", "dashboards"}, 10),
        (("storage",), {"torch", "optuna", "ray", "pydantic", "typer", "plotly", "fastapi", "search_space", "nas"}, 10),
    ],
)  # fmt: skip
def test_the_lower_floors_stand_alone(packages: tuple[str, ...], refused: set[str], least: int) -> None:
    imported = python(ALONE.format(packages=packages, refused=refused)).split()
    assert len(imported) >= least


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or shutil.which(
        "lint-imports"
    )
    assert command is not None, "import-linter is not installed"
    return subprocess.run(
        [command, "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


def test_the_rules_of_imports_are_kept() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The code in another place, to be spoilt."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_breaches_of_the_rules_are_found(copy: Path) -> None:
    planted = {
        "trainers/outcome.py": "import storage.store",
        "dashboards/quantities.py": "import torch",
        "search_space/layout.py": "import torch",
        "search_space/mixers/kda.py": "import search_space.mixers.mla",
        "trainers/loop.py": "import optuna",
        "nas/front.py": "import sqlalchemy",
        "kernels/short_convolution/ops.py": "import search_space.frame",
        "storage/plain.py": "import nas.config",
    }
    for name, line in planted.items():
        path = copy / name
        path.write_text(path.read_text() + f"\n{line}\n")
    done = lint(copy)
    assert done.returncode == 1
    for name, line in planted.items():
        importer = name.removesuffix(".py").replace("/", ".")
        imported = line.removeprefix("import ")
        assert re.search(rf"{re.escape(importer)} -> {re.escape(imported.split('.')[0])}", done.stdout), (
            importer,
            done.stdout,
        )


MARKS = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" + "XX", "HA" + "CK")) + r")\b")
PLACES = re.compile(
    r"(?<![\w.}])/(?:ro" + r"ot|ho" + r"me|wo" + r"rk|mn" + r"t|Us" + r"ers)/\w"
    r"|--?(?:extra-)?index" + r"-url|py" + r"pi\.org/simple|files\.python" + r"hosted"
)


def test_there_are_no_marks_of_unfinished_work() -> None:
    found = [
        f"{name}: {line}"
        for name, text in texts().items()
        for line in text.splitlines()
        if MARKS.search(line)
    ]
    assert found == []


def test_no_file_names_a_place_of_one_machine_or_a_registry() -> None:
    found = [
        f"{name}: {line}"
        for name, text in texts().items()
        for line in text.splitlines()
        if PLACES.search(line)
    ]
    assert found == []


def test_every_module_says_in_a_line_what_it_is() -> None:
    for path in [*modules(), *sorted((ROOT / "tests").rglob("*.py"))]:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_the_readme_lists_the_vocabulary() -> None:
    path = ROOT / "README.md"
    if not path.exists():
        pytest.skip("there is no README.md yet")
    from nas.mixer_table import BEGIN, END, markdown

    shown = path.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    made = markdown().splitlines()
    assert [line for line in shown if line not in made] == [], "run make readme: these lines are outdated"
    assert [line for line in made if line not in shown] == [], "run make readme: these lines are missing"
    assert shown == made, "run make readme: the order has changed"


def test_constraints_pin_what_the_project_asks_for() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        *settings["dependencies"],
        *(item for group in settings["optional-dependencies"].values() for item in group),
    ]
    names = {re.split(r"[\[<>=;~! ]", item)[0].lower() for item in asked}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].strip().lower() for line in lines if "==" in line}
    assert names <= pinned


def test_what_is_imported_is_asked_for() -> None:
    """A package that only another one's extra brings is there on our machines and missing on a stranger's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {re.split(r"[^\w.-]", text)[0].lower() for text in project["dependencies"]}
    brings = importlib.metadata.packages_distributions()
    lacking = set()
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for top in {name.partition(".")[0] for name in names} - {*PACKAGES, *sys.stdlib_module_names}:
                owners = {owner.lower() for owner in brings.get(top, [top])}
                if not owners & asked:
                    lacking.add(f"{path.relative_to(ROOT)}: {top}")
    assert not lacking
