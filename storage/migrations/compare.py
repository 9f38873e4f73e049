"""Where the tables of a database differ from those of the models, a line a difference."""

from typing import Any

from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import CheckConstraint, Connection, Dialect, Table, inspect

from storage.tables import Base


def differences(connection: Connection) -> list[str]:
    """What is missing or other than the models say; tables of strangers are none of our business."""
    ours = Base.metadata.tables
    context = MigrationContext.configure(
        connection,
        opts={
            "compare_type": True,
            "include_name": lambda name, kind, _parents: kind != "table" or name in ours,
        },
    )
    there = set(inspect(connection).get_table_names())
    lines: list[str] = []
    for found in compare_metadata(context, Base.metadata):
        # Changes of one column come as a list, everything else as a tuple.
        for change in found if isinstance(found, list) else [found]:
            if change[0] != "add_index" or change[1].table.name in there:
                lines.append(_line(change, connection.dialect))
    for table in Base.metadata.sorted_tables:
        if table.name in there:
            lines += _unseen_by_alembic(connection, table)
    return lines


def _line(change: tuple[Any, ...], dialect: Dialect) -> str:
    """Alembic says what it would do; the reader wants to know what is there."""
    action, kind = change[0].split("_", 1)
    if action == "modify":
        _, _, table, column, _, there, wanted = change
        if kind == "nullable":
            return f"column {table}.{column} may {'' if there else 'not '}be empty"
        if kind == "type":
            there, wanted = there.compile(dialect), wanted.compile(dialect)
        return f"column {table}.{column} has the {kind} {there} instead of {wanted}"
    ending = "is missing" if action == "add" else "is not known here"
    if kind == "column":
        return f"column {change[2]}.{change[3].name} {ending}"
    thing = change[1]
    if kind == "table":
        return f"table {thing.name} {ending}"
    name = thing.name or "over " + ", ".join(column.name for column in thing.columns)
    word = {"fk": "foreign key", "constraint": "unique constraint"}.get(kind, kind)
    return f"{word} {name} of table {thing.table.name} {ending}"


def _unseen_by_alembic(connection: Connection, table: Table) -> list[str]:
    inspector, lines = inspect(connection), []
    wanted = [column.name for column in table.primary_key.columns]
    there = inspector.get_pk_constraint(table.name)["constrained_columns"]
    if there != wanted:
        shown = ", ".join(there) or "nothing"
        lines.append(f"table {table.name} has the primary key {shown} instead of {', '.join(wanted)}")
    checks = {check["name"] for check in inspector.get_check_constraints(table.name)}
    for constraint in table.constraints:
        if isinstance(constraint, CheckConstraint) and constraint.name not in checks:
            lines.append(f"check {constraint.name} of table {table.name} is missing")
    return lines
