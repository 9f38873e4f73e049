"""Text: what is read, what is refused and where, how it is split and known, and what a score means."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from trainers.tasks import corpus
from trainers.tasks.bytes import Bytes
from trainers.tasks.corpus import load
from trainers.tasks.registry import TASKS, make_task


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    load.cache_clear()


def page(number: int) -> bytes:
    return (f"page {number}: " + "the quick brown fox jumps over the lazy dog, é. " * 12).encode()


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Sixty files in two folders; a tenth of them, by name, is held out."""
    folder = tmp_path / "library"
    (folder / "deep").mkdir(parents=True)
    for number in range(60):
        (folder / ("deep" if number % 2 else ".") / f"{number:02}.txt").write_bytes(page(number))
    return folder


def test_a_folder_is_split_by_file(library: Path) -> None:
    found = load(str(library))
    assert found.files == 60 and found.source == str(library)
    held = [number for number in range(60) if page(number) in found.held_out]
    trained = [number for number in range(60) if page(number) in found.train]
    assert sorted(held + trained) == list(range(60))
    assert 1 <= len(held) <= 15
    assert sum(map(len, map(page, held))) == len(found.held_out)


def test_a_file_stays_on_its_side_when_others_come(library: Path) -> None:
    before = load(str(library))
    load.cache_clear()
    (library / "new.txt").write_bytes(page(99))
    after = load(str(library))
    for number in range(60):
        assert (page(number) in before.held_out) == (page(number) in after.held_out)


def test_one_file_is_split_by_place(tmp_path: Path) -> None:
    text = bytes(range(32, 127)) * 100
    path = tmp_path / "book.txt"
    path.write_bytes(text)
    found = load(str(path))
    assert found.train + found.held_out == text
    assert len(found.held_out) == len(text) // 10


def test_the_hash_knows_every_byte_and_the_split(tmp_path: Path) -> None:
    hashes = set()
    for index, text in enumerate((b"a" * 9000, b"a" * 8999 + b"b", b"b" + b"a" * 8999, b"a" * 9010)):
        path = tmp_path / f"{index}" / "book.txt"
        path.parent.mkdir()
        path.write_bytes(text)
        hashes.add(load(str(path)).sha256)
    assert len(hashes) == 4 and all(len(digest) == 64 for digest in hashes)
    again = tmp_path / "again" / "book.txt"
    again.parent.mkdir()
    again.write_bytes(b"a" * 9000)
    assert load(str(again)).sha256 in hashes


def test_hidden_files_and_folders_are_passed_over(library: Path) -> None:
    before = load(str(library)).sha256
    load.cache_clear()
    (library / ".git").mkdir()
    (library / ".git" / "config").write_bytes(b"\xff\xfe not text")
    (library / ".secret.txt").write_text("hidden")
    assert load(str(library)).sha256 == before


def test_json_lines_give_their_texts(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    texts = [f"text {number} with \u2028 and \x85 inside, ü" * 20 for number in range(40)]
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    found = load(str(path))
    assert found.train + found.held_out == "\n".join(texts).encode()


def test_bin_files_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "raw.bin"
    path.write_bytes(bytes(range(256)) * 20)
    assert load(str(path)).train[:256] == bytes(range(256))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", b"fine\nfine\ncaf\xe9\n" + b"x" * 5000, r"latin\.txt:3 is not UTF-8 text \(byte 13\)"),
        ("a.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', r'a\.jsonl:3 is no JSON object with a "text" field'),
        ("b.jsonl", b'{"text": "a"}\n{"text": 5}\n', r'b\.jsonl:2 has a "text" that is no string'),
        ("c.jsonl", b"{oops\n", r"c\.jsonl:1 is no JSON object"),
        ("d.jsonl", b'["text"]\n', r"d\.jsonl:1 is no JSON object"),
        ("e.jsonl", b'{"text": "\\ud800"}\n', r"e\.jsonl:1 has half a surrogate pair"),
        ("short.txt", b"x" * 1023, "holds 1023 bytes of text; at least 1024 are needed"),
        ("empty.txt", b"", "holds 0 bytes of text"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(str(path))


def test_a_bad_file_of_a_folder_is_named(library: Path) -> None:
    (library / "deep" / "bad.txt").write_bytes(b"\n\n\xff")
    with pytest.raises(ValueError, match=r"deep/bad\.txt:3 is not UTF-8"):
        load(str(library))


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file or folder .*nowhere"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"is empty; put \.txt"):
        load(str(tmp_path))


def test_no_more_is_read_than_the_most(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MOST_BYTES", 10_000)
    found = load(str(library))
    assert len(found.train) + len(found.held_out) == 10_000


def test_the_standard_library_is_always_at_hand() -> None:
    found = load("stdlib")
    assert len(found.train) > 3_000_000 and len(found.held_out) > 200_000 and found.files > 200
    assert b"def dataclass(" in found.train + found.held_out
    assert load("stdlib") is found


@pytest.fixture
def task(library: Path) -> Bytes:
    return Bytes(data=str(library))


def test_targets_are_the_next_bytes_of_the_training_text(task: Bytes) -> None:
    batch = task.batch(32, 20, torch.Generator().manual_seed(0))
    assert batch.tokens.shape == batch.targets.shape == (32, 20)
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    for row, last in zip(batch.tokens.tolist(), batch.targets[:, -1].tolist(), strict=True):
        assert bytes([*row, last]) in task.corpus.train
    again = task.batch(32, 20, torch.Generator().manual_seed(0))
    assert torch.equal(again.tokens, batch.tokens)
    assert not torch.equal(task.batch(32, 20, torch.Generator().manual_seed(1)).tokens, batch.tokens)


def test_the_last_stretch_of_the_text_is_drawn_too(tmp_path: Path) -> None:
    path = tmp_path / "tight.txt"
    path.write_bytes(bytes(65 + n % 26 for n in range(4096)))
    short = Bytes(data=str(path))
    room = len(short.corpus.train) - 1
    batch = short.batch(4, room, torch.Generator().manual_seed(0))
    assert bytes([*batch.tokens[0].tolist(), int(batch.targets[0, -1])]) == short.corpus.train


def test_a_part_that_is_too_short_is_refused(task: Bytes) -> None:
    task.check(20)
    length = len(task.corpus.held_out)
    task.check(length - 1)
    with pytest.raises(ValueError, match=f"has {length} bytes in a split, too few for sequences of {length}"):
        task.check(length)
    with pytest.raises(ValueError, match="too few for sequences"):
        task.score(lambda *_: torch.zeros(1), length)


def test_who_knows_only_how_often_bytes_occur_scores_nothing(task: Bytes) -> None:
    counts = np.bincount(np.frombuffer(task.corpus.train, dtype=np.uint8), minlength=256) + 1
    log_shares = torch.from_numpy(np.log(counts / counts.sum())).float()
    score = task.score(lambda _tokens, asked: log_shares.expand(int(asked.sum()), 256), 32)
    assert score.score < 0.02
    assert score.metrics["bits_per_byte"] == pytest.approx(score.metrics["unigram_bits_per_byte"], rel=0.02)


def test_who_knows_nothing_scores_nothing_and_never_less(task: Bytes) -> None:
    score = task.score(lambda _tokens, asked: torch.zeros(int(asked.sum()), 256), 32)
    assert score.score == 0.0 and score.metrics["bits_per_byte"] == pytest.approx(8.0)


def test_who_foresees_everything_scores_one(task: Bytes) -> None:
    def oracle(tokens: Tensor, asked: Tensor) -> Tensor:
        # The held-out text itself tells how each stretch goes on.
        text = task.corpus.held_out
        following = []
        for row in tokens.tolist():
            place = text.index(bytes(row))
            following += [*row[1:], text[place + len(row)]]
        logits = torch.full((int(asked.sum()), 256), -50.0)
        logits[torch.arange(len(following)), following] = 50.0
        return logits

    score = task.score(oracle, 60)
    assert score.score == pytest.approx(1.0, abs=0.02)


def test_half_the_bits_are_half_the_score(task: Bytes) -> None:
    def blunt(tokens: Tensor, asked: Tensor) -> Tensor:
        nexts = torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1)[
            asked
        ]  # right but for the last byte of a stretch
        share = 2.0 ** -(task.unigram_bits / 2)
        logits = torch.full((len(nexts), 256), math.log((1 - share) / 255))
        logits[torch.arange(len(nexts)), nexts] = math.log(share)
        return logits

    assert task.score(blunt, 200).score == pytest.approx(0.5, abs=0.03)


def test_a_compressor_stands_beside_for_scale(task: Bytes) -> None:
    score = task.score(lambda _tokens, asked: torch.zeros(int(asked.sum()), 256), 32)
    assert 0 < score.metrics["zlib_bits_per_byte"] < score.metrics["unigram_bits_per_byte"]


def test_the_list_of_tasks_is_open_and_misspellings_are_answered() -> None:
    for name in TASKS:
        made = make_task(name, "stdlib")
        assert made.name == name and made.vocabulary > 1
        made.check(64)
    with pytest.raises(ValueError, match="no task 'byte'; did you mean bytes"):
        make_task("byte", "stdlib")
