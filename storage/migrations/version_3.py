"""Version 3: whose attempt a trial's is and until when, how often one failed, and layouts that are set aside.

The columns are written out and not taken from the tables of today, which later versions may change.
"""

from alembic.operations import Operations
from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

_BEFORE = "state IN ('waiting', 'running', 'done', 'pruned', 'unfit', 'lost')"
_AFTER = "state IN ('waiting', 'running', 'done', 'pruned', 'unfit', 'lost', 'quarantined')"


def upgrade(operations: Operations) -> None:
    """From version 2; trials that were running have no driver, and wait again when a search goes on."""
    whole = BigInteger().with_variant(Integer(), "sqlite")
    operations.create_table(
        "nas_drivers",
        Column("id", whole, primary_key=True),
        Column("study_id", whole, ForeignKey("nas_studies.id"), nullable=False),
        Column("name", Text(), nullable=False),
        Column("started_at", Double(), nullable=False),
        Column("lease_until", Double(), nullable=False),
        Column("ended_at", Double()),
    )
    operations.create_index("nas_drivers_by_study", "nas_drivers", ["study_id", "ended_at"])
    operations.create_table(
        "nas_repeat_claims",
        Column("trial_id", whole, ForeignKey("nas_trials.id"), primary_key=True),
        Column("seed", whole, primary_key=True, autoincrement=False),
        Column("driver_id", whole, ForeignKey("nas_drivers.id"), nullable=False),
    )
    with operations.batch_alter_table("nas_trials", copy_from=_trials_before(whole)) as batch:
        batch.add_column(Column("driver_id", whole, ForeignKey("nas_drivers.id", name="nas_trial_driver")))
        batch.add_column(Column("failures", whole, nullable=False, server_default="0"))
        batch.drop_constraint("nas_trial_state", type_="check")
        batch.create_check_constraint("nas_trial_state", _AFTER)


def _trials_before(whole: BigInteger) -> Table:
    """SQLite does not say by itself which checks a table has, and would lose them when it is made anew."""
    tables = MetaData()
    for name, key in (("nas_studies", "id"), ("nas_layouts", "key"), ("nas_drivers", "id")):
        Table(name, tables, Column(key, Text() if key == "key" else whole, primary_key=True))
    return Table(
        "nas_trials",
        tables,
        Column("id", whole, primary_key=True),
        Column("study_id", whole, ForeignKey("nas_studies.id"), nullable=False),
        Column("number", whole, nullable=False),
        Column("state", Text(), nullable=False),
        Column("origin", Text(), nullable=False),
        Column("layout_key", Text(), ForeignKey("nas_layouts.key"), nullable=False),
        Column("params", JSON(), nullable=False),
        Column("sampler_attrs", JSON(), nullable=False),
        Column("costs", JSON(), nullable=False),
        Column("layer_costs", JSON(), nullable=False),
        Column("evaluation_key", Text(), nullable=False),
        Column("attempts", whole, nullable=False),
        Column("why", Text(), nullable=False),
        Column("created_at", Double(), nullable=False),
        Column("started_at", Double()),
        Column("ended_at", Double()),
        UniqueConstraint("study_id", "number"),
        CheckConstraint(_BEFORE, name="nas_trial_state"),
        Index("nas_trials_by_state", "study_id", "state", "number"),
        Index("nas_trials_by_layout", "study_id", "layout_key"),
        Index("ix_nas_trials_evaluation_key", "evaluation_key"),
    )
