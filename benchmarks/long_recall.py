"""Recall at four times the training length: every mixer on MQAR and on a needle, from one and the same short training.

Two layers of each mixer, its sizes as a proxy of the default target has them, are trained on texts of 32 tokens. MQAR
tells four pairs; at four times the length the same number is told, and only questions beyond the training length count.
The needle is one pair in noise, asked as the last token. All have the same budget, one seed and one learning rate, so
that a mixer which fails at 1x may only be slow, or want another rate; what 4x loses against 1x is about length.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.common import save
from nas.config import resolve
from search_space.cost import layout_cost
from search_space.frame import Frame
from search_space.layout import Layout
from search_space.vocabulary import VOCABULARY, read, shrink_layout
from trainers.loop import Training, train
from trainers.model import ProxyModel
from trainers.tasks.mqar import HELD_OUT_SEED, Mqar
from trainers.tasks.needle import Needle
from trainers.tasks.task import IGNORED, Task

PAIRS, TIMES = 4, 4
MQAR, NEEDLE = Mqar(pairs=(PAIRS,), held_out=256), Needle()
STEPS, BATCH, LEARNING_RATE, SEED, WIDTH, LENGTH = 300, 32, 1e-2, 0, 32, 32
FRAME = Frame(width=WIDTH, train_length=LENGTH, context=LENGTH, dtype="float32", max_length=TIMES * LENGTH)


def proxy(name: str) -> Layout:
    """Two layers of the mixer as a proxy has them."""
    return shrink_layout(read(f"2*{name}/swiglu[ratio=2]"), resolve().target.frame(), FRAME)


class Reader:
    """A proxy that was trained on one task."""

    def __init__(self, name: str, task: Task) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(SEED)
        self.model = ProxyModel(proxy(name), replace(FRAME, vocabulary=task.vocabulary), stem_taps=4)
        training = Training(steps=STEPS, batch=BATCH, length=LENGTH, learning_rate=LEARNING_RATE)
        train(self.model, task, training, seed=SEED, device=torch.device("cpu"))
        self.model.eval()

    def predict(self, tokens: Tensor, asked: Tensor) -> Tensor:
        """Logits [N, V] of the asked positions."""
        with torch.no_grad():
            parts = zip(tokens.split(128), asked.split(128), strict=True)
            return torch.cat([self.model.head(self.model(part)[mask]) for part, mask in parts])


def mqar(name: str) -> tuple[float, float]:
    """Share of right answers at the training length, and beyond it in texts of four times that."""
    reader = Reader(name, MQAR)
    shares = []
    for length, first in ((LENGTH, 0), (TIMES * LENGTH, LENGTH)):
        batch = MQAR.make(MQAR.held_out, length, PAIRS, torch.Generator().manual_seed(HELD_OUT_SEED))
        asked = (batch.targets != IGNORED) & (torch.arange(length) >= first)
        right = reader.predict(batch.tokens, asked).argmax(-1) == batch.targets[asked]
        shares.append(right.double().mean().item())
    return shares[0], shares[1]


def needle(name: str) -> tuple[float, float]:
    """Share of right answers at the end of texts of the training length, and of four times that."""
    metrics = NEEDLE.score(Reader(name, NEEDLE).predict, LENGTH).metrics
    return metrics["needle_accuracy_1x"], metrics["needle_accuracy_4x"]


def state_bytes(name: str) -> int:
    """What one of the two layers keeps of the longer texts."""
    return layout_cost(proxy(name), replace(FRAME, context=TIMES * LENGTH)).stored_bytes // 2


def row_of(name: str) -> dict[str, object]:
    """One mixer's line."""
    (mqar_1x, mqar_4x), (needle_1x, needle_4x) = mqar(name), needle(name)
    shares = {"mqar_1x": mqar_1x, "mqar_4x": mqar_4x, "needle_1x": needle_1x, "needle_4x": needle_4x}
    return {
        "mixer": name,
        "state_bytes": state_bytes(name),
        **{key: round(share, 3) for key, share in shares.items()},
    }


def table(rows: list[dict[str, object]]) -> str:
    """The rows as the README shows them."""
    lines = [
        "| mixer | state bytes | mqar 1× | mqar 4× | needle 1× | needle 4× |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        name, kept, *shares = row.values()
        lines.append(f"| `{name}` | {kept:,} | {' | '.join(f'{share:.2f}' for share in shares)} |")
    return "\n".join(lines)


def main() -> None:
    """Train every mixer, a process a core, print the table and save."""
    rows = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for row in pool.map(row_of, VOCABULARY):
            rows.append(row)
            print(row, flush=True)
    print(table(rows), flush=True)
    save(
        "long_recall",
        {
            "seed": SEED,
            "width": WIDTH,
            "length": LENGTH,
            "layers": 2,
            "steps": STEPS,
            "batch": BATCH,
            "learning_rate": LEARNING_RATE,
            "pairs": PAIRS,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
