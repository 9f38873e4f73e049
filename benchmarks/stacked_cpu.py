"""Four learning rates of one layout trained stacked in one process, beside one after another, on one CPU thread.

The time of both ways in turn, and how far the losses lie apart. Small proxies are many small operations, which stacking
starts once instead of four times; in larger ones arithmetic is all, and there is less to gain.
"""

import statistics
import time
from collections.abc import Sequence

import torch

from benchmarks.common import save
from search_space.frame import Frame
from search_space.vocabulary import read
from trainers.loop import NotFinite, Training, train
from trainers.members import Member, train_members
from trainers.model import ProxyModel
from trainers.tasks.mqar import Mqar

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
LENGTH, STEPS, ROUNDS = 32, 40, 3
SIZES = ((16, 8), (32, 8), (64, 32))
"""Width and batch; the last is the default proxy of a search."""
LAYOUTS = ("2*full", "full kda", "2*gated_delta", "mamba2 window[size=8]")
TASK = Mqar()
CPU = torch.device("cpu")


def members(layout: str, width: int, batch: int) -> list[Member]:
    """A fresh model for every learning rate, alike at first."""
    made = []
    for rate in RATES:
        torch.manual_seed(0)
        frame = Frame(
            width=width,
            train_length=LENGTH,
            context=LENGTH,
            batch=batch,
            dtype="float32",
            vocabulary=TASK.vocabulary,
            max_length=LENGTH,
        )
        model = ProxyModel(read(layout), frame)
        training = Training(steps=STEPS, batch=batch, length=LENGTH, learning_rate=rate)
        made.append(Member(model=model, training=training, seed=0, random_state=torch.get_rng_state()))
    return made


def one_by_one(group: Sequence[Member]) -> list[float]:
    """The last losses, each run alone."""
    runs = [train(m.model, TASK, m.training, seed=m.seed, device=CPU) for m in group]
    return [run.curve[-1][1] for run in runs]


def stacked(group: Sequence[Member]) -> list[float]:
    """The last losses, all runs as one."""
    losses = []
    for run in train_members(group, TASK, device=CPU):
        assert not isinstance(run, NotFinite), run
        losses.append(run.curve[-1][1])
    return losses


def row(layout: str, width: int, batch: int) -> dict[str, object]:
    """Both ways in turn, a few times; the median of the ratios."""
    ratios, seconds = [], []
    for _ in range(ROUNDS):
        times, ends = [], []
        for way in (one_by_one, stacked):
            group = members(layout, width, batch)
            began = time.perf_counter()
            ends.append(way(group))
            times.append(time.perf_counter() - began)
        ratios.append(times[1] / times[0])
        seconds.append(times[0])
    apart = max(abs(a - b) / abs(a) for a, b in zip(*ends, strict=True))
    return {
        "layout": layout,
        "width": width,
        "batch": batch,
        "stacked_over_one_by_one": round(statistics.median(ratios), 3),
        "one_by_one_s": round(statistics.median(seconds), 3),
        "losses_apart": float(f"{apart:.1e}"),
    }


def main() -> None:
    """Measure and save."""
    torch.set_num_threads(1)
    rows = []
    for width, batch in SIZES:
        for layout in LAYOUTS:
            rows.append(row(layout, width, batch))
            print(rows[-1], flush=True)
    save("stacked_cpu", {"length": LENGTH, "steps": STEPS, "learning_rates": RATES, "rows": rows})


if __name__ == "__main__":
    main()
