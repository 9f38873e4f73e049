"""What the numbers say, in sentences with their uncertainty; where they say nothing, that."""

from dashboards import quantities
from dashboards.reasons import FRONT, Effects, Estimate, Importance, Ranking, Reasons, Share, Swap

MOST_SWAPS = 3
CHANCE = 0.05


def sentences(found: Reasons) -> tuple[str, ...]:
    """The most telling first."""
    said = [
        *_swaps(found),
        *(line for item in found.importance[:2] for line in _importance(item)),
        *_mixers(found, found.importance[0]),
        *_shares(found),
        *_pairs(found),
        *_trust(found.effects),
        *_progress(found),
    ]
    return tuple(said)


def layer_name(position: str) -> str:
    """A position as people count: layer 1."""
    return f"layer {int(position) + 1}" if position.isdigit() else "the settings that all layers share"


def heaviest(ranking: Ranking) -> str | None:
    """What weighs most, where it weighs more than chance gives."""
    if not ranking.weights or ranking.weights[0].share <= ranking.by_chance:
        return None
    return ranking.weights[0].name


def _importance(item: Importance) -> list[str]:
    what = (
        "what brings a layout near the front"
        if item.objective == FRONT
        else f"what makes {item.objective} good"
    )
    if item.why_not:
        return [f"PED-ANOVA cannot say {what}: {item.why_not}."]
    top, chance = item.positions.weights[0], quantities.share(item.positions.by_chance)
    if heaviest(item.positions) is None:
        return [
            f"PED-ANOVA finds no layer that stands out in {what}: {layer_name(top.name)} has most of "
            f"it, {quantities.share(top.share)}, and shuffled results give up to {chance}."
        ]
    return [
        f"PED-ANOVA: {layer_name(top.name)} has {quantities.share(top.share)} of {what}; shuffled results give at most "
        f"{chance}."
    ]


def best_swaps(found: Reasons) -> list[Swap]:
    """In each layer what its best mixer gains most against, where that is sure; the largest first."""
    if found.effects.trust is None or not found.effects.trust.enough:
        return []
    chosen: dict[int, Swap] = {}
    for swap in found.effects.swaps:
        known = chosen.get(swap.position)
        if swap.sure and swap.seen and (known is None or abs(swap.change) > abs(known.change)):
            chosen[swap.position] = swap
    return sorted(chosen.values(), key=lambda swap: -abs(swap.change))


def _swaps(found: Reasons) -> list[str]:
    effects, name = found.effects, found.objective
    if effects.why_not:
        return [f"What a change of a layer would do to {name} cannot be said: {effects.why_not}."]
    best = best_swaps(found)
    if not best and effects.trust is not None and effects.trust.enough:
        return [f"No change of a single layer is sure to change {name}."]
    said = []
    for place, swap in enumerate(best[:MOST_SWAPS]):
        where = f"Layer {swap.position + 1}"
        if place == 0:
            alone = all(abs(other.change) < min(abs(swap.low), abs(swap.high)) for other in best[1:])
            # The other measure must not say otherwise a line below.
            agreed = heaviest(found.importance[0].positions) in (None, str(swap.position))
            where = f"{where} matters most" if alone and agreed else f"{where} has the largest effect"
        said.append(
            f"{where}: {swap.mixer} there is worth {_interval(swap)} of {name} against {swap.against}, on average over "
            f"{effects.layouts} layouts."
        )
    return said


def _interval(estimate: Estimate) -> str:
    return quantities.interval(estimate.change, estimate.low, estimate.high)


def _mixers(found: Reasons, own: Importance) -> list[str]:
    name = None if own.why_not else heaviest(own.mixers)
    if name is None:
        return []
    rows = [row for row in found.ratios if row.name == name and not row.family]
    best = (max if found.maximise else min)(rows, key=lambda row: row.best)
    return [
        f"Of the mixers, how many layers are {name} matters most; the best {found.objective}, "
        f"{quantities.value(found.objective, best.best)}, has it in {best.layers} of {best.of}: "
        f'"{best.best_layout}" (trial {best.best_trial}).'
    ]


def telling_shares(found: Reasons) -> list[Share]:
    """Those that chance would hardly deal among so many, the least likely first."""
    bound = CHANCE / max(1, len(found.shares))
    return sorted((item for item in found.shares if item.chance < bound), key=lambda item: item.chance)


def _shares(found: Reasons) -> list[str]:
    telling = telling_shares(found)
    if not telling:
        return []
    first = telling[0]
    return [
        f"{first.front} of {first.front_of} layouts on the front hold {first.mixer} in layer {first.position + 1}, and "
        f"{first.rest} of {first.rest_of} of the rest: a draw by lot is so uneven once in {_rough(1 / max(first.chance, 1e-9))} times."
    ]


def _rough(x: float) -> str:
    """A number to its first digit: 20,000; a huge one as it is in words."""
    return "a million" if x >= 1e6 else f"{float(f'{x:.0e}'):,.0f}"


def _pairs(found: Reasons) -> list[str]:
    effects = found.effects
    if effects.trust is None or not effects.trust.enough:
        return []
    bold = [pair for pair in effects.pairs if abs(pair.change) > (pair.high - pair.low) * 0.75]
    if not bold:
        return []
    pair = bold[0]
    return [
        f"{pair.second} right after {pair.first} gives {_interval(pair)} of {found.objective} beyond what the "
        f"two give by themselves (it occurs {pair.seen} times)."
    ]


def _trust(effects: Effects) -> list[str]:
    trust = effects.trust
    if trust is None:
        return []
    chance = f"chance reaches {quantities.quality(trust.by_chance)}"
    rank = quantities.quality(trust.rank_correlation)
    if not trust.enough:
        return [
            f"The surrogate cannot foretell trials that it was not shown (rank correlation {rank}, {chance}): what it "
            "says of single changes is not to be relied on."
        ]
    return [
        f"The surrogate foretells trials that it was not shown with a rank correlation of {rank} ({chance}), and is wrong "
        f"by {quantities.quality(trust.error)} where guessing the mean is by {quantities.quality(trust.spread)}."
    ]


def _progress(found: Reasons) -> list[str]:
    steps = found.progress
    if len(steps) < 4:
        return []
    last, before = steps[-1], steps[len(steps) * 3 // 4 - 1]
    gained = last.hypervolume - before.hypervolume
    whole = quantities.quality(last.hypervolume)
    if gained <= 0:
        return [f"The last quarter of the trials added nothing to the hypervolume, which is {whole}."]
    return [f"The last quarter of the trials added {gained:.2g} to the hypervolume, which is {whole} now."]
