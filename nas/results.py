"""What a worker returned, as the records that are stored."""

from collections.abc import Collection

from storage.records import ResultRecord
from trainers.outcome import Measured


def records_of(outcome: Measured, stored: Collection[int], seed: int) -> list[ResultRecord]:
    """The results of every rung that has none stored, each with the steps since the one before; the outcome's own last."""
    records, before = [], 0
    for measured in (*outcome.rungs, outcome):
        if measured.rung not in stored:
            records.append(_record(measured, measured.new_steps - before, seed))
            before = measured.new_steps
    return records


def _record(outcome: Measured, new_steps: int, seed: int) -> ResultRecord:
    return ResultRecord(
        rung=outcome.rung,
        quality=outcome.quality,
        scores=outcome.scores,
        details={**outcome.details, "metrics": dict(outcome.metrics), "new_steps": new_steps},
        steps=outcome.steps,
        tokens=outcome.tokens,
        train_s=outcome.train_s,
        worker_s=outcome.worker_s,
        seed=seed,
    )
