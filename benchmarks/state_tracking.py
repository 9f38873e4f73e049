"""Two tables of what a state can do: parity beyond the training length, and recall by the size of the state.

Parity is trained from three seeds, because whether a recurrence falls into the solution in a short training is a matter
of luck; the table shows the median and all three.

Published: Grazzi et al. 2024, arXiv:2411.12537 (a recurrence tracks parity only with negative eigenvalues), and Arora et
al. 2023, arXiv:2312.04927 (recall grows with the state, attention has it at once).
"""

import torch

from benchmarks.common import save
from search_space.cost import layout_cost
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
RECALL = (
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
PARITY_BUDGET = Budget(
    tasks=(TaskBudget(name="parity", weight=1.0, steps=1200, batch=64, learning_rates=(1e-2,)),),
    length=32,
    data="stdlib",
)
RECALL_BUDGETS = {
    pairs: Budget(
        tasks=(
            TaskBudget(name="mqar", weight=1.0, steps=600, batch=64, learning_rates=(1e-2,), pairs=(pairs,)),
        ),
        length=64,
        data="stdlib",
    )
    for pairs in (8, 16)
}
SEEDS = (0, 1, 2)
WIDTH = 32


def trained(text: str, budget: Budget, seed: int) -> Measured:
    """Two layers of the mixer, trained as a proxy and scored."""
    frame = Frame(width=WIDTH, train_length=budget.length, context=budget.length, dtype="float32")
    layout = read(f"2*{text}/swiglu[ratio=2]")
    outcome = evaluate(Job(layers=tuple(layout.to_json()), frame=frame, budget=budget, seed=seed))
    assert isinstance(outcome, Measured), outcome
    return outcome


def state_bytes(text: str, length: int) -> int:
    """What one layer keeps for a text of that length."""
    frame = Frame(width=WIDTH, train_length=length, context=length, dtype="float32")
    return layout_cost(read(f"{text}/none"), frame).stored_bytes


def main() -> None:
    """Train all and save."""
    torch.set_num_threads(1)
    parity, recall = [], []
    for text in PARITY:
        outcomes = [trained(text, PARITY_BUDGET, seed) for seed in SEEDS]
        median = sorted(outcomes, key=lambda outcome: outcome.quality)[len(SEEDS) // 2]
        parity.append(
            {
                "mixer": text,
                "scores": [round(outcome.quality, 3) for outcome in outcomes],
                "score": round(median.quality, 3),
                **{name: round(value, 3) for name, value in median.metrics.items()},
                "train_s": round(sum(outcome.train_s for outcome in outcomes), 1),
            }
        )
        print(parity[-1], flush=True)
    for text in RECALL:
        row: dict[str, object] = {"mixer": text, "state_bytes": state_bytes(text, 64)}
        for pairs, budget in RECALL_BUDGETS.items():
            outcome = trained(text, budget, SEEDS[0])
            row[f"accuracy_{pairs}"] = round(outcome.metrics[f"mqar_accuracy_{pairs}"], 3)
        recall.append(row)
        print(recall[-1], flush=True)
    save("state_tracking", {"seeds": SEEDS, "width": WIDTH, "layers": 2, "parity": parity, "recall": recall})


if __name__ == "__main__":
    main()
