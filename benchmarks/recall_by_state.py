"""Recall by the size of the state: what a layer keeps against how many pairs it can tell again.

Published: recall grows with the state, and attention has it at once (Zoology, arXiv:2312.04927; Based, arXiv:2402.18668).
As there, the better of the learning rates counts: a run may sit on a plateau at the one and leave it at the other.
"""

import os
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks.common import save
from search_space.cost import layout_cost
from search_space.frame import Frame
from search_space.vocabulary import read
from trainers.evaluate import Budget, Job, TaskBudget, evaluate
from trainers.outcome import Measured

MIXERS = (
    "full",
    "window[size=8]",
    "linear[heads=1,head_dim=8]",
    "linear[heads=1,head_dim=16]",
    "linear[heads=1,head_dim=32]",
    "mamba2[state=8]",
    "mamba2[state=16]",
    "mamba2[state=32]",
    "gated_delta[heads=1,head_dim=8]",
    "gated_delta[heads=1,head_dim=16]",
    "gated_delta[heads=1,head_dim=32]",
)
PAIRS = (8, 16)
LEARNING_RATES = (1e-2, 3e-3)
STEPS, SEED, WIDTH, LENGTH = 600, 0, 32, 64
FRAME = Frame(width=WIDTH, train_length=LENGTH, context=LENGTH, dtype="float32")


def accuracy(text: str, pairs: int, learning_rate: float) -> float:
    """Share of pairs that two layers of the mixer tell again after a short training."""
    torch.set_num_threads(1)
    task = TaskBudget(
        name="mqar", weight=1.0, steps=STEPS, batch=64, learning_rates=(learning_rate,), pairs=(pairs,)
    )
    budget = Budget(tasks=(task,), length=LENGTH, data="stdlib")
    layout = read(f"2*{text}/swiglu[ratio=2]")
    outcome = evaluate(Job(layers=tuple(layout.to_json()), frame=FRAME, budget=budget, seed=SEED))
    assert isinstance(outcome, Measured), outcome
    return outcome.metrics[f"mqar_accuracy_{pairs}"]


def state_bytes(text: str) -> int:
    """What one layer keeps of such a text."""
    return layout_cost(read(f"{text}/none"), FRAME).stored_bytes


def main() -> None:
    """Train all, a process a core, and save."""
    asked = [(text, pairs, rate) for text in MIXERS for pairs in PAIRS for rate in LEARNING_RATES]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(asked, pool.map(accuracy, *zip(*asked, strict=True)), strict=True))
    rows = []
    for text in MIXERS:
        row: dict[str, object] = {"mixer": text, "state_bytes": state_bytes(text)}
        for pairs in PAIRS:
            by_rate = {rate: round(found[text, pairs, rate], 3) for rate in LEARNING_RATES}
            row[f"accuracy_{pairs}"] = max(by_rate.values())
            row[f"accuracy_{pairs}_by_rate"] = {str(rate): value for rate, value in by_rate.items()}
        rows.append(row)
        print(row, flush=True)
    save(
        "recall_by_state",
        {"seed": SEED, "width": WIDTH, "length": LENGTH, "layers": 2, "steps": STEPS, "rows": rows},
    )


if __name__ == "__main__":
    main()
