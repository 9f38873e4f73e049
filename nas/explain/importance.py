"""How much each choice tells the best trials from all of them: Optuna's PED-ANOVA on our records.

Pearson's divergence of what the best trials answered from what all of them did, parameter by parameter (Watanabe and
others, arXiv:2304.10255), conditional parameters included (arXiv:2601.20800). It says that an answer matters, not which
one is better, and its noise is never below nought: so the same is done with shuffled values, to tell what chance gives.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import create_trial

from dashboards.reasons import FRONT, Importance, Ranking, Weight
from nas.explain.answers import CHANNEL, MIXER, SHARED, encoding_of, mixer_of, position_of, subject_of
from nas.explain.studied import LEAST, Numbers, Studied, mixers_of, too_early
from nas.samplers.encoding import Params

optuna.logging.set_verbosity(optuna.logging.ERROR)

TOP_SHARE, TOP_LEAST = 1 / 3, 6
"""The best third of the trials. Of the best tenth, which is usual, a study of fifty layouts has five: a density of five
answers is mostly its prior, and a layer that decides everything was not found by it in one study of six."""
ASKED_LEAST = 5
"""Trials that a parameter must have been asked in."""
SHUFFLES = 20
"""What is more than the most that these give happens by chance once in so many times and one."""
MOST = 300
"""Trials that are looked at; of more, so many by lot: Optuna's evaluator takes a millisecond a trial and shuffle."""


def importances(studied: Studied, objective: str) -> tuple[Importance, ...]:
    """Of one objective, of being near the front, and of the other objectives that were learnt."""
    others = [name for name in studied.learnt if name != objective]
    return tuple(importance(studied, name) for name in (objective, FRONT, *others))


def importance(studied: Studied, objective: str) -> Importance:
    """Of one objective, or of being near the front."""
    places = studied.inside
    if len(places) > MOST:
        places = np.sort(np.random.default_rng(0).choice(places, MOST, replace=False))
    count = len(places)
    losses = _losses(studied, objective)[places]
    top = _top(losses) if count else 0

    def none(why: str) -> Importance:
        return Importance(objective=objective, trials=count, top=top, why_not=why)

    if count < LEAST:
        return none(too_early(count))
    if top == count:
        same = (
            "all trials are on the front" if objective == FRONT else "the best value is that of most trials"
        )
        return none(f"{same}, so that nothing tells the best from the rest")
    params = [studied.trials[place].params for place in places]
    asked, left_out = _asked(params)
    if not asked:
        return none("no parameter has more than one answer")
    whole = _divergences(params, asked, losses, top)
    counts = [_counts(studied.trials[place].layout.layers) for place in places]
    mixers = {name: _count_range([own.get(name, 0) for own in counts]) for own in counts for name in own}
    varied = {name: own for name, own in mixers.items() if not own.single()}
    held = [{name: own.get(name, 0) for name in varied} for own in counts]
    if not whole[0].sum():
        return none("the best trials answered as all of them did")
    by_position = _sums(asked, lambda name: SHARED if (p := position_of(name)) is None else str(p))
    return Importance(
        objective=objective,
        trials=count,
        top=top,
        parameters=_ranking(list(asked), whole),
        positions=_ranking(*_summed(by_position, whole)),
        kinds=_ranking(*_summed(_sums(asked, _kind), whole)),
        mixers=_ranking(list(varied), _divergences(held, varied, losses, top)) if varied else Ranking(),
        left_out=left_out,
    )


def _losses(studied: Studied, objective: str) -> Numbers:
    """[N] smaller is better."""
    if objective == FRONT:
        return studied.ranks.astype(np.float64)
    values = studied.values(objective)
    return -values if studied.explainable[objective] else values


def _top(losses: Numbers) -> int:
    """How many trials count as the best; those that equal the last of them do too."""
    wanted = min(len(losses), max(TOP_LEAST, math.ceil(TOP_SHARE * len(losses))))
    return int((losses <= np.sort(losses)[wanted - 1]).sum())


def _asked(params: Sequence[Params]) -> tuple[dict[str, BaseDistribution], tuple[str, ...]]:
    """What may be weighed, and what may not."""
    asked, left_out = {}, []
    for name, distribution in encoding_of(params).distributions.items():
        count = sum(name in answers for answers in params)
        if distribution.single():
            left_out.append(f"{name}: has one answer only")
        elif count < ASKED_LEAST:
            left_out.append(f"{name}: asked in {count} trial{'s' if count > 1 else ''} only")
        else:
            asked[name] = distribution
    return asked, tuple(left_out)


def _divergences(
    params: Sequence[Params], asked: Mapping[str, BaseDistribution], losses: Numbers, top: int
) -> NDArray[np.float64]:
    """[1 + SHUFFLES, P] of every parameter: of the values, then of shuffled ones."""
    study = optuna.create_study()
    for answers in params:
        known = {name: answers[name] for name in asked if name in answers}
        study.add_trial(
            create_trial(value=0.0, params=known, distributions={name: asked[name] for name in known})
        )
    for trial in study.get_trials(deepcopy=False):
        # Each has a copy of its own, which the evaluator compares word by word a million times unless they are one.
        trial.distributions = {name: asked[name] for name in trial.params}
    # Half a trial less, so that no rounding lets one more in.
    evaluator = PedAnovaImportanceEvaluator(target_quantile=(top - 0.5) / len(losses))
    names = [name for name in asked if any(name in answers for answers in params)]
    rng = np.random.default_rng(0)
    rows = []
    for shuffle in range(1 + SHUFFLES):
        order = rng.permutation(losses) if shuffle else losses
        with warnings.catch_warnings():
            # That smaller is better, that a regime has few trials, that unnormalised shares are experimental.
            warnings.simplefilter("ignore")
            found = get_param_importances(
                study, evaluator=evaluator, params=names, target=_by_number(order), normalize=False
            )
        rows.append([found[name] for name in asked])
    return np.array(rows)


def _by_number(losses: Numbers) -> Callable[[optuna.trial.FrozenTrial], float]:
    return lambda trial: float(losses[trial.number])


def _sums(asked: Mapping[str, BaseDistribution], group: Callable[[str], str]) -> dict[str, list[int]]:
    """The columns of each group."""
    found: dict[str, list[int]] = {}
    for column, name in enumerate(asked):
        found.setdefault(group(name), []).append(column)
    return found


def _summed(groups: dict[str, list[int]], rows: Numbers) -> tuple[list[str], Numbers]:
    return list(groups), np.stack([rows[:, columns].sum(1) for columns in groups.values()], axis=1)


def _kind(question: str) -> str:
    subject = subject_of(question)
    if subject == MIXER:
        return "which mixer"
    return "which channel mixer" if subject == CHANNEL else f"settings of {mixer_of(question)}"


def _counts(layers: Sequence[Params]) -> dict[str, int]:
    """How many layers hold each mixer."""
    found: dict[str, int] = {}
    for layer in layers:
        for mixer in dict.fromkeys(mixers_of(layer)):
            found[mixer] = found.get(mixer, 0) + 1
    return found


def _count_range(counts: Sequence[int]) -> IntDistribution:
    return IntDistribution(min(counts), max(counts))


def _ranking(names: Sequence[str], rows: Numbers) -> Ranking:
    """Shares of the first row's sum, and the heaviest share that a shuffled row gave."""
    total = float(rows[0].sum()) or 1.0
    shares = rows / total
    order = np.argsort(-shares[0], kind="stable")
    return Ranking(
        weights=tuple(Weight(name=names[place], share=float(shares[0, place])) for place in order),
        by_chance=min(1.0, float(shares[1:].max())),
    )
