"""Version 2: what further seeds of a trial gave has a table of its own.

The columns are written out and not taken from the tables of today, which later versions may change.
"""

from alembic.operations import Operations
from sqlalchemy import JSON, BigInteger, Column, Double, ForeignKey, Integer, Text


def upgrade(operations: Operations) -> None:
    """From version 1; nothing that is there changes."""
    whole = BigInteger().with_variant(Integer(), "sqlite")
    operations.create_table(
        "nas_repeats",
        Column("trial_id", whole, ForeignKey("nas_trials.id"), primary_key=True),
        Column("seed", whole, primary_key=True, autoincrement=False),
        Column("evaluation_key", Text(), nullable=False),
        Column("rung", whole, nullable=False),
        Column("quality", Double(), nullable=False),
        Column("scores", JSON(), nullable=False),
        Column("details", JSON(), nullable=False),
        Column("steps", whole, nullable=False),
        Column("tokens", whole, nullable=False),
        Column("train_s", Double(), nullable=False),
        Column("worker_s", Double(), nullable=False),
    )
    operations.create_index("ix_nas_repeats_evaluation_key", "nas_repeats", ["evaluation_key"])
