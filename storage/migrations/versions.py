"""The list of versions, each with the step that reaches it from the one before, and how the steps are taken."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, update

from storage.migrations import version_2, version_3, version_4
from storage.tables import SchemaRow

Step: TypeAlias = Callable[[Operations], None]
"""A change of a column or constraint goes through `operations.batch_alter_table`: SQLite rebuilds the table for it."""

STEPS: Mapping[int, Step] = {2: version_2.upgrade, 3: version_3.upgrade, 4: version_4.upgrade}
"""By the version that is reached; a database of the oldest version was made whole."""


def migrate(connection: Connection, before: int, steps: Mapping[int, Step]) -> int:
    """Takes every step after a version, within the caller's transaction; returns the version reached."""
    operations = Operations(MigrationContext.configure(connection))
    after = max(steps)
    for version in range(before + 1, after + 1):
        steps[version](operations)
        connection.execute(update(SchemaRow).values(version=version))
    return after
