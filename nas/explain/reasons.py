"""All of it for one study: importance, effects, shares, ratios, the hypervolume's growth, and sentences about them."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from dashboards.reasons import Reasons
from dashboards.view import study_view
from nas.explain.effects import effects
from nas.explain.importance import importances
from nas.explain.shares import ratios, shares
from nas.explain.studied import studied
from nas.explain.words import sentences
from storage.records import StudyRecord, TrialRecord


def reasons(
    study: StudyRecord, trials: Sequence[TrialRecord], objective: str | None = None
) -> Reasons | None:
    """Why a study's layouts are as good as they are; None while no trial was trained to the end.

    objective: what is explained, the study's first learnt objective if left out, or the score of a task.

    Raises:
        ValueError: the objective cannot be explained.
    """
    known = studied(study, trials)
    if not known.trials:
        return None
    name = objective or known.learnt[0]
    known.check(name)
    found = Reasons(
        study=study.name,
        objective=name,
        maximise=known.explainable[name],
        trials=len(known.trials),
        inside=len(known.inside),
        on_front=int((known.ranks == 0).sum()),
        layers=known.layers,
        importance=importances(known, name),
        effects=effects(known, name),
        shares=shares(known),
        ratios=ratios(known, name),
        progress=study_view(study, known.trials).progress,
        said=(),
    )
    return replace(found, said=sentences(found))


def reasons_json(found: Reasons) -> dict[str, Any]:
    """The same as plain JSON."""
    return asdict(found)
