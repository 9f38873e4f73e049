"""Files that run something when they are unpickled: given as a checkpoint, as data, as a configuration or a database."""

import ast
import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dashboards
import kernels
import nas
import search_space
import storage
import trainers
from trainers import checkpoint
from trainers.checkpoint import Damaged

Run = Callable[..., Any]
Refused = Callable[..., str]


class Payload:
    """Unpickled anywhere, it leaves a marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.marker, "it ran"))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


def pickled(marker: Path) -> dict[str, bytes]:
    """The payload in every dress that a loader might take off."""
    place = marker.with_name("weights.pt")
    torch.save({"weight": torch.ones(64, 64), "more": Payload(marker)}, place)
    return {
        "weights.pt": place.read_bytes(),
        "weights.pkl": pickle.dumps([Payload(marker), b"x" * 4096], protocol=5),
        # Protocol 0 is ASCII from end to end: text, as far as anybody can tell.
        "text.pkl": pickle.dumps([Payload(marker), "x" * 4096], protocol=0),
    }


NAMES = ("weights.pt", "weights.pkl", "text.pkl")


def test_the_payload_is_live(marker: Path) -> None:
    for content in pickled(marker).values():
        if not content.startswith(b"PK"):
            pickle.loads(content)
            assert marker.read_text() == "it ran"
            marker.unlink()
    torch.load(marker.with_name("weights.pt"), weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("forged", [False, True], ids=["as it is", "with its hash in the header"])
def test_fault_41_malicious_checkpoint_is_refused_and_nothing_runs(
    tmp_path: Path, marker: Path, name: str, forged: bool
) -> None:
    folder = tmp_path / "checkpoints"
    checkpoint.save(str(folder), "k" * 32, 0, {"worker_s": 1.0}, {"weight": torch.ones(4)})
    place = checkpoint.place_of(str(folder), "k" * 32, 0)
    content = pickled(marker)[name]
    place.write_bytes(content)
    if forged:
        header = json.loads(place.with_suffix(".json").read_text())
        header["sha256"] = hashlib.sha256(content).hexdigest()
        place.with_suffix(".json").write_text(json.dumps(header))
    with pytest.raises(Damaged, match="cannot be read" if forged else "damaged"):
        checkpoint.load(str(folder), "k" * 32, 0)
    assert not marker.exists()


@pytest.mark.parametrize("name", NAMES)
def test_fault_41_malicious_checkpoint_of_a_search_costs_a_training_and_runs_nothing(
    run: Run, config_file: Callable[..., str], url: str, tmp_path: Path, marker: Path, name: str
) -> None:
    """Every checkpoint of a search is exchanged while its trials rest; the search trains them from the start."""
    rungs = {"shares": [0.5], "keep": 0.1}
    tasks = {"mqar": {"steps": 4, "batch": 4, "learning_rates": [0.01]}}
    path = config_file({"rungs": rungs, "tasks": tasks})
    folder = tmp_path / "resting"
    search = ("search", "--config", path, "--storage", url, "--set", f"checkpoints={folder}")
    content = pickled(marker)[name]
    real = checkpoint.save

    def exchanged(*given: Any) -> None:
        real(*given)
        place = checkpoint.place_of(*given[:3])
        place.write_bytes(content)
        header = json.loads(place.with_suffix(".json").read_text())
        header["sha256"] = hashlib.sha256(content).hexdigest()
        place.with_suffix(".json").write_text(json.dumps(header))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("trainers.evaluate.save", exchanged)
        said = run(*search, "--trials", 4)
    assert said.code == 0 and "trained from the start" in said.err, said.err
    assert not marker.exists()


@pytest.mark.parametrize("name", NAMES)
def test_fault_41_malicious_file_given_as_data_config_or_database_runs_nothing(
    run: Run,
    refused: Refused,
    config_file: Callable[..., str],
    url: str,
    tmp_path: Path,
    marker: Path,
    name: str,
) -> None:
    path = tmp_path / name
    path.write_bytes(pickled(marker)[name])
    config = config_file({"tasks": {"bytes": {"steps": 1, "batch": 2, "learning_rates": [0.01]}}})
    search = ("search", "--config", config, "--storage", url, "--trials", 1)
    if name == "text.pkl":
        assert run(*search, "--data", path).code == 0  # text like any other
    else:
        assert f"{path}:1 is not UTF-8 text" in refused(*search, "--data", path)
        raw = path.with_suffix(".bin")
        raw.write_bytes(path.read_bytes())
        assert run(*search, "--data", raw).code == 0  # bytes like any others
    refused("search", "--config", path, "--storage", url)
    refused("search", "--config", config, "--storage", f"sqlite:///{path}", code=3)
    refused("trials", "--storage", f"sqlite:///{path}", code=3)
    assert not marker.exists()


@pytest.mark.parametrize(
    "text",
    ["study: !!python/object/apply:pathlib.Path.write_text [{path}, ran]", "!!python/name:os.system {path}"],
)
def test_fault_41_malicious_yaml_is_refused_and_nothing_runs(
    refused: Refused, tmp_path: Path, marker: Path, url: str, text: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("{path}", str(marker)))
    assert "is not valid YAML" in refused("search", "--config", path, "--storage", url)
    refused("search", "--storage", url, "--set", text.replace("{path}", str(marker)).replace(": ", "=", 1))
    assert not marker.exists()


UNPICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def test_fault_41_nothing_in_the_code_unpickles() -> None:
    """Workers of Ray's are given our own objects by our own driver; of files and tables nothing is ever unpickled."""
    found = []
    for package in (dashboards, kernels, nas, search_space, storage, trainers):
        for path in Path(next(iter(package.__path__))).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name.partition(".")[0] for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [(node.module or "").partition(".")[0]]
                elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    spoken = f"{node.value.id}.{node.attr}"
                    names = (
                        ["pickle"]
                        if spoken in ("torch.load", "np.load", "yaml.load", "pd.read_pickle")
                        else []
                    )
                elif isinstance(node, ast.Name) and node.id in ("PickleType", "eval", "exec"):
                    names = ["pickle"]
                found += [f"{path}: {name}" for name in names if name in UNPICKLERS]
    assert found == []
