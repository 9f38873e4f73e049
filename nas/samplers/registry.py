"""The open list of samplers."""

from collections.abc import Sequence

from nas.samplers.sampler import Sampler
from search_space.notation import nearest
from search_space.space import Space

SAMPLERS = ("random", "tpe", "nsga2")


def check_sampler(name: str) -> None:
    """Raise ValueError for an unknown sampler."""
    if name not in SAMPLERS:
        raise ValueError(f"no sampler {name!r}{nearest(name, SAMPLERS)} (there are {', '.join(SAMPLERS)})")


def make_sampler(name: str, space: Space, *, maximise: Sequence[bool], seed: int) -> Sampler:
    """A sampler over a space; `maximise` says for each objective which way is better."""
    check_sampler(name)
    from nas.samplers.optuna_sampler import OptunaSampler

    return OptunaSampler(name, space, maximise=maximise, seed=seed)
