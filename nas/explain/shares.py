"""What was tried, counted: which mixers stand at which depth on the front and off it, and quality by how many there are."""

import math
from collections.abc import Callable, Sequence

from dashboards.reasons import Ratio, Share
from nas.explain.studied import Numbers, Studied, label, mixers_of


def shares(studied: Studied) -> tuple[Share, ...]:
    """Every mixer at every depth where a trial holds it; a mixer side by side with others counts with them."""
    found = []
    for position in range(studied.layers):
        held: dict[str, list[int]] = {}
        totals = [0, 0]
        for trial, rank in zip(studied.trials, studied.ranks, strict=True):
            if position < len(trial.layout.layers):
                off = int(rank > 0)
                held.setdefault(label(trial.layout.layers[position]), [0, 0])[off] += 1
                totals[off] += 1
        for mixer, (front, rest) in sorted(held.items(), key=lambda item: (-item[1][0], item[0])):
            found.append(
                Share(
                    position=position,
                    mixer=mixer,
                    front=front,
                    front_of=totals[0],
                    rest=rest,
                    rest_of=totals[1],
                    chance=tail(front, totals[0], front + rest, sum(totals)),
                )
            )
    return tuple(found)


def tail(hits: int, drawn: int, marked: int, whole: int) -> float:
    """How often so many marked ones, or more unevenly many, are among those drawn by lot: the rarer of both sides."""
    least, most = max(0, drawn + marked - whole), min(drawn, marked)
    ways = [math.comb(marked, k) * math.comb(whole - marked, drawn - k) for k in range(least, most + 1)]
    total = math.comb(whole, drawn)
    return min(sum(ways[: hits - least + 1]), sum(ways[hits - least :])) / total


def ratios(studied: Studied, objective: str) -> tuple[Ratio, ...]:
    """By mixer and then by family: the trials that hold it in no layer, in one, in two, and so on."""
    values = studied.values(objective)
    families = studied.study.families
    held = [[set(mixers_of(layer)) for layer in trial.layout.layers] for trial in studied.trials]
    mixers = sorted({mixer for layers in held for layer in layers for mixer in layer})
    kin: dict[str, set[str]] = {}
    for mixer in mixers:
        kin.setdefault(families.get(mixer, "unknown"), set()).add(mixer)
    rows = [row for mixer in mixers for row in _ratios(studied, objective, values, held, mixer, {mixer})]
    for family, members in sorted(kin.items()):
        rows += _ratios(studied, objective, values, held, family, members, family=True)
    return tuple(rows)


def _ratios(
    studied: Studied,
    objective: str,
    values: Numbers,
    held: Sequence[Sequence[set[str]]],
    name: str,
    members: set[str],
    *,
    family: bool = False,
) -> list[Ratio]:
    places: dict[tuple[int, int], list[int]] = {}
    for place, layers in enumerate(held):
        count = sum(bool(layer & members) for layer in layers)
        places.setdefault((count, len(layers)), []).append(place)
    choose: Callable[..., int] = max if studied.explainable[objective] else min
    found = []
    for (count, of), own in sorted(places.items(), key=lambda item: (item[0][1], item[0][0])):
        best = choose(own, key=lambda place: values[place])
        found.append(
            Ratio(
                name=name,
                family=family,
                layers=count,
                of=of,
                ratio=lowest(of - count, count),
                trials=len(own),
                on_front=sum(int(studied.ranks[place] == 0) for place in own),
                mean=float(values[own].mean()),
                deviation=float(values[own].std(ddof=1)) if len(own) > 1 else None,
                best=float(values[best]),
                best_trial=studied.trials[best].number,
                best_layout=studied.trials[best].layout.text,
            )
        )
    return found


def lowest(others: int, these: int) -> str:
    """Two counts in lowest terms: 3:1."""
    divisor = math.gcd(others, these) or 1
    return f"{others // divisor}:{these // divisor}"
