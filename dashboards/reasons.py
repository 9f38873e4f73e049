"""Why a study's layouts are as good as they are: frozen values alone, which pages and pictures are made from.

They are computed on the floor above, where the surrogate and Optuna live; `dataclasses.asdict` makes plain JSON of them.
Positions are counted from 0 here and called layers, from 1, wherever people read them.
"""

from dataclasses import dataclass

from dashboards.view import Progress

FRONT = "front"
"""What an importance is of when it is of being on the front or next to it, rather than of one objective."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One thing that was chosen, and its share of what all choices together decide."""

    name: str
    share: float


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Weights, the heaviest first; twenty studies with shuffled values gave no more than `by_chance` to any."""

    weights: tuple[Weight, ...] = ()
    by_chance: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Importance:
    """How much each choice tells the best trials from all of them."""

    objective: str
    trials: int
    """Those that it was computed from."""
    top: int
    """Those that count as the best."""
    parameters: Ranking = Ranking()
    positions: Ranking = Ranking()
    """Sums over a position's parameters; the name is the position, or "all" for settings that all layers share."""
    kinds: Ranking = Ranking()
    """Sums over all positions: which mixer, which channel mixer, and the settings of each mixer."""
    mixers: Ranking = Ranking()
    """How many layers hold each mixer, apart from where they stand."""
    left_out: tuple[str, ...] = ()
    """Parameters that nothing can be said of, and why."""
    why_not: str = ""
    """Why there are no weights; empty where there are."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A change of the objective, and the interval that holds it 19 times in 20 if the surrogate is right."""

    change: float
    low: float
    high: float

    @property
    def sure(self) -> bool:
        """Whether the interval lies on one side of nought."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True)
class Effect(Estimate):
    """What becomes of the objective, on average over layouts, when this mixer is put in this position of each."""

    position: int
    mixer: str
    seen: int
    """Trials that hold it there; 0 for a guess from other positions alone."""


@dataclass(frozen=True, kw_only=True)
class Swap(Estimate):
    """What the best mixer of a position is worth there against another one."""

    position: int
    mixer: str
    against: str
    seen: int
    """Trials that hold the less seen of the two there."""


@dataclass(frozen=True, kw_only=True)
class Pair(Estimate):
    """What one mixer right after another gives beyond what each of the two gives by itself."""

    first: str
    second: str
    seen: int
    """How often the one follows the other, over all trials and depths."""


@dataclass(frozen=True, kw_only=True)
class Trust:
    """How well a surrogate that was not shown a trial foretells it."""

    trials: int
    folds: int
    rank_correlation: float
    by_chance: float
    """A rank correlation that guessing reaches once in 20 times."""
    error: float
    """Root of the mean square of what it is wrong by."""
    spread: float
    """The same of always guessing the mean."""

    @property
    def enough(self) -> bool:
        """Whether it does better than guessing."""
        return self.rank_correlation > self.by_chance


@dataclass(frozen=True, kw_only=True)
class Effects:
    """What a surrogate of the records says of changes to their layouts."""

    objective: str
    trials: int
    """Those that it learnt from."""
    layouts: int
    """Those that the changes are averaged over, and of the front."""
    front_layouts: int
    trust: Trust | None = None
    cells: tuple[Effect, ...] = ()
    """Every mixer in every position, averaged over the layouts of all trials."""
    front_cells: tuple[Effect, ...] = ()
    """The same, averaged over the layouts of the front."""
    swaps: tuple[Swap, ...] = ()
    """In every position, its best mixer among those seen there against each other one."""
    pairs: tuple[Pair, ...] = ()
    """Those that occur a few times, the strongest first."""
    why_not: str = ""


@dataclass(frozen=True, kw_only=True)
class Share:
    """How often a position holds a mixer, on the front and off it."""

    position: int
    mixer: str
    front: int
    front_of: int
    rest: int
    rest_of: int
    chance: float
    """How often so uneven a deal, in its direction, comes about by chance."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The trials whose layouts hold a mixer, or one of a family, in so many layers."""

    name: str
    family: bool
    layers: int
    of: int
    ratio: str
    """All other layers to these, in lowest terms: 3:1."""
    trials: int
    on_front: int
    mean: float
    deviation: float | None
    """Standard deviation over the trials; None for a single one."""
    best: float
    best_trial: int
    best_layout: str


@dataclass(frozen=True, kw_only=True)
class Reasons:
    """Everything that is said of why."""

    study: str
    objective: str
    maximise: bool
    trials: int
    """Those that were trained to the end; no others count here."""
    inside: int
    """Those of them whose layouts the space holds; presets from outside of it count for shares and ratios alone."""
    on_front: int
    layers: int
    importance: tuple[Importance, ...]
    """Of the objective that is explained, of being near the front, then of the other objectives that were learnt."""
    effects: Effects
    shares: tuple[Share, ...]
    ratios: tuple[Ratio, ...]
    progress: tuple[Progress, ...]
    said: tuple[str, ...]
    """The same in sentences, the most telling first."""


def outside(found: Reasons) -> str:
    """How many trials the space does not hold, and what they count for."""
    count = found.trials - found.inside
    has = "has" if count == 1 else "have"
    return (
        f"{count} {has} mixers or sizes that the space does not offer: they count for shares and ratios alone"
    )
