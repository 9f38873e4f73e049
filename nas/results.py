"""What a worker returned, as the records that are stored."""

from collections.abc import Collection, Mapping
from typing import Any

from nas.errors import Refused
from storage.records import ResultRecord
from trainers.outcome import Measured, Outcome


def refuse_other_data(outcome: Outcome, data: Mapping[str, Any]) -> None:
    """Nothing is stored of what was trained on other data than the study's: a worker reads the files by itself.

    Raises:
        Refused: the hashes differ; the message shows both.
    """
    if not isinstance(outcome, Measured) or not data:
        return
    read = outcome.details.get("data", {}).get("sha256", data["sha256"])
    if read != data["sha256"]:
        raise Refused(
            f"a worker read other data from {data['source']} than this search: "
            f"sha256 {data['sha256']} here, {read} there\n"
            "put the data back as it was, or give the new data another --study name"
        )


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
