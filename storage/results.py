"""Results as values of a row and back: those of a trial's rungs and those of its repeats."""

from typing import Any

from storage.plain import finite, numbers, plain, whole
from storage.records import ResultRecord
from storage.tables import AnyRow

RESULT_COLUMNS = ("rung", "quality", "scores", "details", "steps", "tokens", "train_s", "worker_s", "seed")


def result_values(result: ResultRecord) -> dict[str, Any]:
    """The values of a result's row, checked. ValueError names what is not finite or cannot be stored.

    The details alone may hold NaN or infinity (a curve that diverged at one learning rate); they become None.
    """
    return {
        "rung": whole(result.rung, "rung"),
        "quality": finite(result.quality, "quality"),
        "scores": numbers(result.scores, "scores"),
        "details": plain(result.details, "details", non_finite_as_none=True),
        "steps": whole(result.steps, "steps"),
        "tokens": whole(result.tokens, "tokens"),
        "train_s": finite(result.train_s, "train_s"),
        "worker_s": finite(result.worker_s, "worker_s"),
        "seed": whole(result.seed, "seed"),
    }


def result_of(row: AnyRow) -> ResultRecord:
    """The record of a row that has the columns above."""
    return ResultRecord(
        rung=row.rung,
        quality=row.quality,
        scores=row.scores,
        details=row.details,
        steps=row.steps,
        tokens=row.tokens,
        train_s=row.train_s,
        worker_s=row.worker_s,
        seed=row.seed,
    )
