"""The answers that drew layouts: what was asked where, which options there are, and how one position is changed.

A question is "2.mixer", "2.channel", "2.window.size", or "window.size" where all layers share their settings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from optuna.distributions import CategoricalDistribution

from nas.samplers.encoding import Encoding, Params

MIXER, CHANNEL = "mixer", "channel"
SHARED = "all"


def position_of(question: str) -> int | None:
    """The position that a question is of, None for one that all layers share."""
    head = question.partition(".")[0]
    return int(head) if head.isdigit() else None


def subject_of(question: str) -> str:
    """A question without its position: "mixer", "channel", "window.size"."""
    head, _, rest = question.partition(".")
    return rest if head.isdigit() else question


def mixer_of(question: str) -> str | None:
    """The mixer whose setting a question is of, None for a choice of a mixer or of a channel mixer."""
    subject = subject_of(question)
    return None if subject in (MIXER, CHANNEL) else subject.rpartition(".")[0]


def encoding_of(params: Sequence[Params]) -> Encoding:
    """Every question that was asked, with every answer that was given to it in any position.

    Positions offer the same options, so one that a few trials left unseen in some position is still an option there.
    """
    options: dict[str, dict[str, Any]] = {}
    questions: dict[str, None] = {}
    for answers in params:
        for question, value in answers.items():
            questions[question] = None
            options.setdefault(subject_of(question), {})[repr(value)] = value
    ordered = sorted(questions, key=lambda name: (_place(name), subject_of(name) != MIXER, name))
    return Encoding(
        {name: CategoricalDistribution(_sorted(options[subject_of(name)])) for name in ordered}, ordered=True
    )


def _place(question: str) -> int:
    position = position_of(question)
    return -1 if position is None else position


def _sorted(options: dict[str, Any]) -> tuple[Any, ...]:
    """Numbers by size, words by the alphabet."""
    values = list(options.values())
    numbers = all(isinstance(value, int | float) for value in values)
    return tuple(sorted(values) if numbers else sorted(values, key=str))


@dataclass(frozen=True)
class Answers:
    """The answers of many trials, from which a change of mixer takes the new one's settings."""

    params: Sequence[Params]

    @cached_property
    def positions(self) -> list[int]:
        """Those at which a mixer was chosen."""
        asked = {question for answers in self.params for question in answers}
        return sorted(
            position
            for question in asked
            if (position := position_of(question)) is not None and subject_of(question) == MIXER
        )

    @cached_property
    def mixers(self) -> list[str]:
        """Every mixer that was chosen somewhere."""
        return sorted({answers[f"{p}.{MIXER}"] for answers in self.params for p in self.positions})

    def seen(self, position: int, mixer: str) -> int:
        """How many trials hold a mixer in a position."""
        return len(self._donors.get((position, mixer), ()))

    def put(self, answers: Params, position: int, mixer: str, turn: int) -> dict[str, Any]:
        """The answers with a mixer in a position, with settings that a trial gave it: each in its turn.

        Those trials that hold it in this position come first; where none does, those that hold it elsewhere lend theirs.
        """
        old = answers[f"{position}.{MIXER}"]
        if old == mixer:
            return dict(answers)
        lenders = self._donors.get((position, mixer)) or self._anywhere[mixer]
        lender, place = lenders[turn % len(lenders)]
        changed = dict(answers)
        changed[f"{position}.{MIXER}"] = mixer
        kept = any(answers[f"{p}.{MIXER}"] == old for p in self.positions if p != position)
        for question in answers:
            own = mixer_of(question) == old and position_of(question) in (position, None)
            if own and not (position_of(question) is None and kept):
                del changed[question]
        for question, value in lender.items():
            if mixer_of(question) == mixer:
                if position_of(question) == place:
                    changed[f"{position}.{subject_of(question)}"] = value
                elif position_of(question) is None:
                    changed.setdefault(question, value)
        channel, lent = f"{position}.{CHANNEL}", f"{place}.{CHANNEL}"
        if lent not in lender:
            changed.pop(channel, None)
        else:
            changed.setdefault(channel, lender[lent])
        return changed

    @cached_property
    def _donors(self) -> dict[tuple[int, str], list[tuple[Params, int]]]:
        found: dict[tuple[int, str], list[tuple[Params, int]]] = {}
        for answers in self.params:
            for position in self.positions:
                found.setdefault((position, answers[f"{position}.{MIXER}"]), []).append((answers, position))
        return found

    @cached_property
    def _anywhere(self) -> dict[str, list[tuple[Params, int]]]:
        found: dict[str, list[tuple[Params, int]]] = {}
        for (_, mixer), donors in self._donors.items():
            found.setdefault(mixer, []).extend(donors)
        return found
