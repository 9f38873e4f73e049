"""A search over the whole vocabulary at a tiny budget: 200 random layouts must all be drawn, priced, trained and ranked."""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.common import save
from search_space.vocabulary import VOCABULARY, read

RANDOM = 200
SPACE = (
    "--space", "all", "--set", "target.width=256", "--set", "target.depth=8", "--set", "target.context=2048",
    "--set", "target.train_length=1024",
)  # fmt: skip
SEARCH = (
    "--sampler", "random", "--seed", "0", "--set", "tasks.mqar.steps=8", "--set", "tasks.bytes.steps=4",
)  # fmt: skip


def nas(*arguments: str) -> Any:
    """What a command prints as JSON."""
    code = "import sys; from nas.cli.main import run; sys.argv[0] = 'nas'; run()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 0, f"nas {' '.join(arguments)} ended with {done.returncode}"
    return json.loads(done.stdout)


def main() -> None:
    """Search, count the endings, and save a summary."""
    with tempfile.TemporaryDirectory() as folder:
        place = ("--storage", f"sqlite:///{Path(folder) / 'all.db'}", "--study", "all")
        # Uniform layouts and presets come first in every search.
        starts = len(nas("space", *SPACE)["starts"])
        found = nas("search", *place, *SPACE, *SEARCH, "--trials", str(starts + RANDOM))
        trials = nas("trials", *place)
    drawn = [trial for trial in trials if trial["origin"] == "search"]
    assert len(drawn) == RANDOM, f"{len(drawn)} layouts were drawn at random, {RANDOM} were asked for"
    layouts = [read(trial["layout"]) for trial in trials]
    stands_in = Counter(
        name for layout in layouts for name in {b.mixer for layer in layout.layers for b in layer.branches}
    )
    save(
        "whole_vocabulary",
        {
            "arguments": [*SPACE, *SEARCH],
            "mixers": len(VOCABULARY),
            "random": len(drawn),
            "endings": dict(Counter(trial["state"] for trial in trials)),
            "not_done": [
                {"layout": trial["layout"], "why": trial.get("why")}
                for trial in trials
                if trial["state"] != "done"
            ],
            "front": len(found["front"]),
            "layouts_that_hold": {name: stands_in[name] for name in VOCABULARY},
        },
    )


if __name__ == "__main__":
    main()
