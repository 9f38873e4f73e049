"""What a complete table of layouts says: what each mixer is worth where, the front, and how far seeds agree.

`python -m benchmarks.table_facts [TABLE.csv] [--again SECOND_SEED.csv]`; without a table it takes the one of hybrids.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from benchmarks.common import save
from search_space.vocabulary import read
from storage import pareto

DATA = Path(__file__).parent / "data"
TABLE, AGAIN = DATA / "hybrids.csv", DATA / "hybrids_seed_1.csv"
COST = "latency_ms"


def scores_of(table: pd.DataFrame) -> list[str]:
    """Quality and the tasks: columns that are there at a share of the steps as well."""
    return list(dict.fromkeys(name.partition("@")[0] for name in table.columns if "@" in name))


def by_place(table: pd.DataFrame) -> dict[str, dict[str, list[float]]]:
    """By score and mixer, the mean over all layouts that have the mixer at each place, from the first layer on."""
    patterns = [[layer.branches[0].mixer for layer in read(text).layers] for text in table["layout"]]
    places = np.array(patterns)
    mixers = list(dict.fromkeys(places.ravel().tolist()))
    return {
        score: {
            mixer: [
                round(float(table[score][places[:, place] == mixer].mean()), 3)
                for place in range(places.shape[1])
            ]
            for mixer in sorted(mixers)
        }
        for score in scores_of(table)
    }


def front(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The layouts that no other beats in quality and latency, the best quality first."""
    points = np.stack([-table["quality"], table[COST]], axis=1)
    best = table.iloc[pareto.front(points)].sort_values("quality", ascending=False)
    shown = best[["layout", *scores_of(table), COST, "kv_bytes"]]
    return [{str(name): value for name, value in row.items()} for row in shown.to_dict("records")]


def agreement(table: pd.DataFrame, again: pd.DataFrame) -> dict[str, Any]:
    """How alike two seeds score the layouts that both tables hold."""
    both = table.merge(again, on="layout", suffixes=("", " again"))
    found: dict[str, Any] = {"layouts": len(both)}
    for score in scores_of(table):
        one, other = both[score], both[f"{score} again"]
        found[score] = {
            "kendall_tau": round(float(kendalltau(one, other).statistic), 3),
            "mean_difference": round(float((one - other).abs().mean()), 3),
        }
    return found


def main(arguments: Sequence[str] = ()) -> None:
    """Print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", nargs="?", type=Path, default=TABLE, metavar="TABLE.csv")
    parser.add_argument("--again", type=Path, default=AGAIN, metavar="SECOND_SEED.csv")
    options = parser.parse_args(arguments)
    table = pd.read_csv(options.table)
    save(
        "table_facts",
        {
            "table": options.table.name,
            "layouts": len(table),
            "mean_by_place": by_place(table),
            "rungs": {
                name: round(float(kendalltau(table[name], table["quality"]).statistic), 3)
                for name in table.columns
                if name.startswith("quality@")
            },
            "front": front(table),
            "second_seed": agreement(table, pd.read_csv(options.again)) if options.again.exists() else None,
        },
    )


if __name__ == "__main__":
    main(sys.argv[1:])
