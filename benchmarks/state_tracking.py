"""Parity beyond the training length: which mixers can follow a state, and which only count positions.

Published: Grazzi et al. 2024, arXiv:2411.12537: a linear recurrence tracks parity only with negative eigenvalues. Whether
a short training falls into the solution is partly luck, so each is trained from three seeds; the table shows the run in
the middle, and the scores of all three.
"""

import torch

from benchmarks.common import save
from search_space.frame import Frame
from search_space.vocabulary import read
from trainers.evaluate import Budget, Job, TaskBudget, evaluate
from trainers.outcome import Measured

PARITY = (
    "full",
    "mamba2",
    "mamba2[negative=true]",
    "gated_delta",
    "gated_delta[negative=true]",
    "kda",
    "kda[negative=true]",
    "mamba3",
    "rwkv7",
    "lstm",
)
PARITY_BUDGET = Budget(
    tasks=(TaskBudget(name="parity", weight=1.0, steps=1200, batch=64, learning_rates=(1e-2,)),),
    length=32,
    data="stdlib",
)
SEEDS = (0, 1, 2)
WIDTH = 32


def trained(text: str, budget: Budget, seed: int) -> Measured:
    """Two layers of the mixer, trained as a proxy and scored."""
    frame = Frame(width=WIDTH, train_length=budget.length, context=budget.length, dtype="float32")
    layout = read(f"2*{text}/swiglu[ratio=2]")
    outcome = evaluate(Job(layers=tuple(layout.to_json()), frame=frame, budget=budget, seed=seed))
    assert isinstance(outcome, Measured), outcome
    return outcome


def main() -> None:
    """Train all and save."""
    torch.set_num_threads(1)
    parity = []
    for text in PARITY:
        outcomes = [trained(text, PARITY_BUDGET, seed) for seed in SEEDS]
        median = sorted(outcomes, key=lambda outcome: outcome.quality)[len(SEEDS) // 2]
        parity.append(
            {
                "mixer": text,
                "scores": [round(outcome.quality, 3) for outcome in outcomes],
                "score": round(median.quality, 3),
                **{name: round(value, 3) for name, value in median.metrics.items()},
            }
        )
        print(parity[-1], flush=True)
    save("state_tracking", {"seeds": SEEDS, "width": WIDTH, "layers": 2, "parity": parity})


if __name__ == "__main__":
    main()
