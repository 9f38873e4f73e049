"""The tuner keeps what is right and faster, drops what is wrong or does not fit, and writes a table that is read back."""

import json

import pytest
import torch

from kernels import tune
from kernels.check import Deviation
from kernels.configurations import Configuration, find, read, trying, write

ROW = Configuration(
    kernel="forward", widths=(64, 64), num_warps=4, num_stages=1, blocks={"BLOCK_V": 32, "CHUNK": 64}
)
CPU = torch.device("cpu")


def test_candidates_begin_with_the_row_and_change_no_agreed_block():
    found = list(tune.candidates(ROW))
    assert found[0] == ROW
    assert len(found) == len({json.dumps(one.json()) for one in found}) == 4 * 3 * 3
    assert {one.blocks["CHUNK"] for one in found} == {64}
    assert {one.blocks["BLOCK_V"] for one in found} == {16, 32, 64}


@pytest.fixture
def pretend(monkeypatch):
    """Times and errors by warps, in place of a GPU: 8 warps are fastest but wrong, 2 the best that is right, 1 does not fit."""
    current = []

    def deviations(probe, sizes, dtype, device):  # noqa: ARG001
        row = find("scalar_decay", "forward", (64, 64), "float32", "interpreter")
        current.append(row)
        if row.num_warps == 1:
            raise RuntimeError("out of resource: shared memory")
        return [Deviation(name="output 0", error=1.0 if row.num_warps == 8 else 0.0, bound=0.1)]

    times = {4: 10.0, 2: 5.0, 8: 1.0}
    monkeypatch.setattr(tune, "deviations", deviations)
    monkeypatch.setattr(tune, "_time_ms", lambda *_: times[current[-1].num_warps] + current[-1].num_stages)


@pytest.mark.usefixtures("pretend")
def test_the_fastest_that_is_right_wins():
    found = tune.tune_row("scalar_decay", ROW, torch.float32, CPU, shape=tune.small, most=100)
    assert (found.best.num_warps, found.best.num_stages) == (2, 1)
    assert (found.before_ms, found.best_ms) == (11.0, 6.0)
    assert (found.best.architecture, found.best.dtype) == ("interpreter", "float32")
    assert found.tried == 36
    assert found.wrong == found.unfit == 9


@pytest.mark.usefixtures("pretend")
def test_what_is_hardly_faster_does_not_win(monkeypatch):
    monkeypatch.setattr(tune, "BETTER", 0.1)
    found = tune.tune_row("scalar_decay", ROW, torch.float32, CPU, shape=tune.small, most=100)
    assert found.best == found.before


def test_tables_are_written_merged_and_read_back(tmp_path):
    better = Configuration(
        kernel="forward", widths=(64, 64), num_warps=2, num_stages=2, blocks={"BLOCK_V": 64, "CHUNK": 64},
        dtype="bfloat16", architecture="sm_90",
    )  # fmt: skip
    (written,) = tune.save({"scalar_decay": [better]}, tmp_path)
    rows = read(written)
    assert better in rows
    assert len(rows) == len(tune.table("scalar_decay")) + 1
    best = Configuration(**{**better.json(), "widths": (64, 64), "num_warps": 8})
    tune.save({"scalar_decay": [best]}, tmp_path)
    assert best in read(written)
    assert better not in read(written)


def test_a_row_that_is_tried_stands_above_the_table():
    before = find("scalar_decay", "forward", (64, 64), "float32", "sm_90")
    with trying("scalar_decay", [ROW]):
        assert find("scalar_decay", "forward", (64, 64), "float32", "sm_90") == ROW
        assert find("scalar_decay", "step", (64, 64), "float32", "sm_90") is not None
    assert find("scalar_decay", "forward", (64, 64), "float32", "sm_90") == before


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a table of configurations"), ("[{}]", "not a table of configurations"),
     ('[{"kernel": "a", "widths": [1], "num_warps": 3, "num_stages": 1, "blocks": {}}]', "num_warps=3 is not valid")],
)  # fmt: skip
def test_a_broken_table_is_named(tmp_path, text, message):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_rows_are_written_one_a_line_in_a_stable_order(tmp_path):
    path = tmp_path / "table.json"
    write(path, reversed(tune.table("scalar_decay")))
    first = path.read_text()
    write(path, read(path))
    assert path.read_text() == first
    assert len(first.splitlines()) == len(read(path)) + 2
