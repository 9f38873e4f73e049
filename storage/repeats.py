"""Rows of repeats: a finished trial's layout trained to the end with another seed, once for each seed."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Select, delete, func, insert, select
from sqlalchemy.dialects import postgresql, sqlite

from storage import points
from storage.errors import StorageError
from storage.events import add_events
from storage.records import ResultRecord, StudyRecord
from storage.results import RESULT_COLUMNS, result_of
from storage.tables import RepeatClaimRow, RepeatRow, ResultRow, StudyRow, TrialRow

_COLUMNS = tuple(getattr(RepeatRow, name) for name in RESULT_COLUMNS)


def insert_repeat(
    connection: Connection,
    study: StudyRecord,
    number: int,
    evaluation_key: str,
    result: Mapping[str, Any],
) -> bool:
    """Adds a seed to a done trial; False, and nothing changed, where it has that seed already.

    StorageError where there is no such trial, or it is not done.
    """
    wanted = select(TrialRow.id, TrialRow.state).where(
        TrialRow.study_id == study.id, TrialRow.number == number
    )
    row = connection.execute(wanted.with_for_update(key_share=True)).first()
    if row is None:
        raise StorageError(f"study {study.name!r} has no trial {number}: see its numbers with nas trials")
    if row.state != "done":
        raise StorageError(
            f"trial {number} of study {study.name!r} is {row.state}: only a done one is trained with further seeds"
        )
    own = select(ResultRow.seed).where(ResultRow.trial_id == row.id, ResultRow.seed == result["seed"])
    if connection.execute(own).first() is not None:
        return False
    dialect_insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    added = connection.execute(
        dialect_insert(RepeatRow)
        .values(**result, trial_id=row.id, evaluation_key=evaluation_key)
        .on_conflict_do_nothing()
        .returning(RepeatRow.seed)
    ).first()
    connection.execute(
        delete(RepeatClaimRow).where(RepeatClaimRow.trial_id == row.id, RepeatClaimRow.seed == result["seed"])
    )
    if added is None:
        return False
    points.renew(connection, study, row.id, number)
    payload = {"trial": number, "seed": result["seed"], "quality": result["quality"]}
    add_events(connection, study.id, "trial_repeated", [payload])
    return True


def read_repeats(connection: Connection, ids: Select[tuple[int]]) -> dict[int, list[ResultRecord]]:
    """The repeats of the trials with these ids, by seed."""
    wanted = select(RepeatRow.trial_id, *_COLUMNS).where(RepeatRow.trial_id.in_(ids))
    repeats: dict[int, list[ResultRecord]] = {}
    for row in connection.execute(wanted.order_by(RepeatRow.trial_id, RepeatRow.seed)):
        repeats.setdefault(row.trial_id, []).append(result_of(row))
    return repeats


def read_repeat(connection: Connection, evaluation_key: str) -> ResultRecord | None:
    """The result of the first repeat under this key, in any study."""
    wanted = select(*_COLUMNS).where(RepeatRow.evaluation_key == evaluation_key)
    row = connection.execute(wanted.order_by(RepeatRow.trial_id, RepeatRow.seed).limit(1)).first()
    return None if row is None else result_of(row)


def claim_repeat(
    connection: Connection, study: StudyRecord, number: int, seed: int, driver_id: int, *, most: int
) -> bool:
    """Takes a further seed of a trial for a driver; False where another driver has it, its result is there, or the study
    has as many as `most`, those that are claimed among them."""
    # The study's row is held until the commit, so that two drivers cannot both take the last one.
    held_study = select(StudyRow.id).where(StudyRow.id == study.id).with_for_update(key_share=True)
    connection.execute(held_study)
    wanted = select(TrialRow.id).where(TrialRow.study_id == study.id, TrialRow.number == number)
    trial_id = connection.execute(wanted.with_for_update(key_share=True)).scalar_one()
    there = select(RepeatRow.seed).where(RepeatRow.trial_id == trial_id, RepeatRow.seed == seed)
    if connection.execute(there).first() is not None:
        return False
    claim = {"trial_id": trial_id, "seed": seed}
    owner = connection.execute(select(RepeatClaimRow.driver_id).filter_by(**claim)).scalar()
    if owner is not None or connection.execute(_count(study)).scalar_one() >= most:
        return owner == driver_id
    connection.execute(insert(RepeatClaimRow).values(**claim, driver_id=driver_id))
    return True


def _count(study: StudyRecord) -> Select[Any]:
    """How many further seeds a study has, with those that are claimed: in one look, since a result takes its claim's place."""
    mine = select(TrialRow.id).where(TrialRow.study_id == study.id)
    done, claimed = (
        select(func.count()).select_from(row).where(row.trial_id.in_(mine)).scalar_subquery()
        for row in (RepeatRow, RepeatClaimRow)
    )
    return select(done + claimed)


def read_claims(connection: Connection, study: StudyRecord) -> list[tuple[int, int, int]]:
    """Trial, seed and driver of every further seed that is being trained."""
    wanted = (
        select(TrialRow.number, RepeatClaimRow.seed, RepeatClaimRow.driver_id)
        .join(TrialRow, RepeatClaimRow.trial_id == TrialRow.id)
        .where(TrialRow.study_id == study.id)
    )
    return sorted((row.number, row.seed, row.driver_id) for row in connection.execute(wanted))
