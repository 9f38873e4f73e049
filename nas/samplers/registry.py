"""The open list of samplers."""

from nas.samplers.sampler import Aim, Sampler
from search_space.notation import nearest
from search_space.space import Space

SAMPLERS = ("layout", "evolution", "grid", "random", "tpe", "nsga2", "nsga3", "gp")


def check_sampler(name: str) -> None:
    """Raise ValueError for an unknown sampler."""
    if name not in SAMPLERS:
        raise ValueError(f"no sampler {name!r}{nearest(name, SAMPLERS)} (there are {', '.join(SAMPLERS)})")


def make_sampler(name: str, space: Space, aim: Aim, *, seed: int) -> Sampler:
    """A sampler over a space.

    Raises:
        ValueError: there is no such sampler, or the space is too large for it.
    """
    check_sampler(name)
    if name == "grid":
        from nas.samplers.grid import GridSampler

        return GridSampler(space, aim, seed=seed)
    from nas.samplers.optuna_sampler import OptunaSampler

    return OptunaSampler(name, space, aim, seed=seed)
