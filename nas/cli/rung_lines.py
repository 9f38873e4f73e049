"""What the rungs of a study did and are worth, in lines."""

from collections.abc import Sequence
from typing import Any

from nas.climb import calibrations, ladder_of, rules_of
from nas.config import RungsConfig, of_study
from nas.rungs import TRUST_PAIRS, Calibration, Rules
from storage.records import StudyRecord, TrialRecord


def rungs_json(trials: Sequence[TrialRecord], study: StudyRecord) -> dict[str, Any] | None:
    """How many were stopped, what it saved, and what each rung is worth; None for a study that stops nobody."""
    rungs, rules = _rules(study)
    if rules is None:
        return None
    ladder = ladder_of(rules, study.axes, trials)
    return {
        "stopped": sum(trial.state == "pruned" for trial in trials),
        "trained_share": trained_share(trials),
        "rungs": [
            {
                "share": share,
                "pairs": own.pairs,
                "kendall_tau": own.tau,
                "kendall_tau_95": None if own.low is None else [own.low, own.high],
                "pairs_by_chance": own.by_chance,
                "kendall_tau_by_chance": own.tau_by_chance,
                "trusted": own.trusted,
            }
            for share, own in zip(rungs.shares, calibrations(ladder), strict=True)
        ],
    }


def has_rungs(study: StudyRecord) -> bool:
    """Whether the study may stop a trial."""
    return _rules(study)[1] is not None


def rung_lines(trials: Sequence[TrialRecord], study: StudyRecord) -> list[str]:
    """The same for people, of so many of the study's last trials; none for a study that stops nobody."""
    rungs, rules = _rules(study)
    if rules is None or not trials:
        return []
    stopped = sum(trial.state == "pruned" for trial in trials)
    share = trained_share(trials)
    spent = (
        ""
        if share is None
        else f", and {share * 100:.0f} % of the steps were trained that all would have taken"
    )
    last = "the last " if trials[0].number else ""
    lines = [f"Rungs: {stopped} of {last}{len(trials)} layouts were stopped early{spent}"]
    ladder = ladder_of(rules, study.axes, trials)
    for part, own in zip(rungs.shares, calibrations(ladder), strict=True):
        lines.append(f"  at {part * 100:.0f} % of the steps: {_worth(own)}")
    return lines


def _worth(own: Calibration) -> str:
    if own.tau is None:
        return f"{own.pairs} layouts were trained from here to the end, too few to say what it is worth"
    interval = "" if own.low is None else f" ({own.low:.2f} … {own.high:.2f})"
    text = f"Kendall τ {own.tau:.2f}{interval} with the end, over {own.pairs} layouts"
    if own.tau_by_chance is not None:
        text += f"; {own.tau_by_chance:.2f} over the {own.by_chance} that went on by chance"
    if own.pairs < TRUST_PAIRS:
        return f"{text}; not judged before {TRUST_PAIRS}"
    return text if own.trusted else f"{text}; not trusted, so that nobody is stopped here any more"


def trained_share(trials: Sequence[TrialRecord]) -> float | None:
    """The steps that were trained over those that all these trials would have taken; None before one was."""
    whole = max(
        (trial.result.steps for trial in trials if trial.state == "done" and trial.result), default=None
    )
    if not whole:
        return None
    steps = [
        sum(result.details.get("new_steps", result.steps) for result in trial.results)
        for trial in trials
        if trial.results
    ]
    # Nothing was trained where another study had the answer.
    trained = [own for own in steps if own]
    return sum(trained) / (whole * len(trained)) if trained else None


def _rules(study: StudyRecord) -> tuple[RungsConfig, Rules | None]:
    """The study's rungs; those of one that is older than rungs are none."""
    rungs = RungsConfig.model_validate(of_study(study.config)["rungs"])
    return rungs, rules_of(rungs, study.config.get("seed", 0))
