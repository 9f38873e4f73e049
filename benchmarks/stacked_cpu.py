"""Four learning rates of one layout trained stacked in one process, beside one after another, on one CPU thread.

The processor's time of both ways in turn, and how far the losses lie apart at some steps, at the worst learning rate.
Small proxies are many small operations, which stacking starts once instead of four times; in larger ones arithmetic is
all, and there is less to gain.

Both ways round differently, and at a learning rate of .03 training may magnify a difference threefold a step. How far
that goes without any stacking is measured beside it, `nudged_apart`: runs that are alone, with weights moved to the next
float32 before the first step. In float64 both ways agree to 1e-8 (tests/trainers/test_members.py).
"""

import statistics
import time
from collections.abc import Callable, Sequence

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
SHOWN = (2, 10, 20, 30, STEPS - 1)
"""Steps whose losses are compared."""
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


Curves = list[dict[int, float]]
"""Of each run the losses by step."""


def one_by_one(group: Sequence[Member]) -> Curves:
    """Each run alone."""
    runs = [train(m.model, TASK, m.training, seed=m.seed, device=CPU) for m in group]
    return [dict(run.curve) for run in runs]


def stacked(group: Sequence[Member]) -> Curves:
    """All runs as one."""
    curves = []
    for run in train_members(group, TASK, device=CPU):
        assert not isinstance(run, NotFinite), run
        curves.append(dict(run.curve))
    return curves


def nudged(group: Sequence[Member]) -> Sequence[Member]:
    """The members, all of whose weights are moved by as little as float32 can."""
    for member in group:
        for weight in member.model.parameters():
            weight.data = weight.data.nextafter(torch.tensor(torch.inf))
    return group


def apart(left: Curves, right: Curves) -> dict[str, float]:
    """The largest share by which losses of one run differ, by step."""
    return {
        str(step): float(
            f"{max(abs(a[step] - b[step]) / abs(a[step]) for a, b in zip(left, right, strict=True)):.1e}"
        )
        for step in SHOWN
    }


def row(layout: str, width: int, batch: int) -> dict[str, object]:
    """Both ways in turn, a few times; the median of the ratios."""
    ways: tuple[Callable[[Sequence[Member]], Curves], ...] = (one_by_one, stacked)
    ratios, seconds = [], []
    for _ in range(ROUNDS):
        times, curves = [], []
        for way in ways:
            group = members(layout, width, batch)
            began = time.process_time()
            curves.append(way(group))
            times.append(time.process_time() - began)
        ratios.append(times[1] / times[0])
        seconds.append(times[0])
    control = one_by_one(nudged(members(layout, width, batch)))
    return {
        "layout": layout,
        "width": width,
        "batch": batch,
        "stacked_over_one_by_one": round(statistics.median(ratios), 3),
        "one_by_one_s": round(statistics.median(seconds), 3),
        "losses_apart": apart(*curves),
        "nudged_apart": apart(curves[0], control),
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
