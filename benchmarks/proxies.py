"""What the default budget tells apart: scores of uniform and mixed layouts, and the worker's share of time in the loop."""

import torch

from benchmarks.common import save
from nas.config import resolve
from nas.plan import make_plan
from search_space.vocabulary import read
from trainers.evaluate import evaluate
from trainers.outcome import Measured

LAYOUTS = (
    "4*full",
    "4*window[size=256]",
    "4*window[size=1024]",
    "4*linear",
    "4*mamba2",
    "4*kda",
    "4*mla",
    "3*window[size=256] full",
    "3*linear full",
    "3*kda mla",
)


def main() -> None:
    """Train each layout as a search does, and save."""
    torch.set_num_threads(1)
    plan = make_plan(resolve())
    rows = []
    for text in LAYOUTS:
        outcome = evaluate(plan.job(read(text)))
        assert isinstance(outcome, Measured), outcome
        rows.append(
            {
                "layout": text,
                "quality": round(outcome.quality, 3),
                "scores": {name: round(score, 3) for name, score in outcome.scores.items()},
                "metrics": {name: round(value, 3) for name, value in outcome.metrics.items()},
                "train_s": round(outcome.train_s, 2),
                "share_in_loop": round(outcome.train_s / outcome.worker_s, 3),
            }
        )
        print(rows[-1], flush=True)
    save("proxies", {"seed": plan.config.seed, "rows": rows})


if __name__ == "__main__":
    main()
