"""The tables. Names begin with `nas_`, since a database may be shared with others (Optuna also has `studies`)."""

from typing import Any, TypeAlias

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    Row,
    SQLColumnExpression,
    Text,
    UniqueConstraint,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from storage.records import STATES

SCHEMA_VERSION = 4
"""Rises with every change of the tables below, together with a step in `storage.migrations` and a database of the
version before among the tests' data. 1: without repeats. 2: one driver a study, without leases.
3: without points."""

AnyRow: TypeAlias = Row[*tuple[Any, ...]]
"""A row whose columns are read by name."""


class EpochNow(FunctionElement[float]):
    """Seconds since the epoch by the database's clock."""

    type = Double()
    inherit_cache = True
    name = "epoch_now"


@compiles(EpochNow, "sqlite")
def _epoch_now_sqlite(_element: EpochNow, _compiler: SQLCompiler, **_options: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(EpochNow, "postgresql")
def _epoch_now_postgresql(_element: EpochNow, _compiler: SQLCompiler, **_options: Any) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"


def epoch_now() -> SQLColumnExpression[float]:
    """The database's clock, as an SQL expression."""
    return EpochNow()


class Base(DeclarativeBase):
    """Types by annotation. JSON and not JSONB: JSONB would rewrite 1e300 as an integer of 301 digits."""

    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy's own name, and read only once
        # SQLite counts up by itself only in a column called exactly INTEGER; it holds 64 bits there all the same.
        int: BigInteger().with_variant(Integer(), "sqlite"),
        float: Double(),
        str: Text(),
        bytes: LargeBinary(),
        dict[str, Any]: JSON(),
        list[dict[str, Any]]: JSON(),
    }


class SchemaRow(Base):
    __tablename__ = "nas_schema"
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class StudyRow(Base):
    __tablename__ = "nas_studies"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    config: Mapped[dict[str, Any]]
    config_hash: Mapped[str]
    axes: Mapped[list[dict[str, Any]]]
    families: Mapped[dict[str, Any]]
    created_at: Mapped[float]


class DriverRow(Base):
    __tablename__ = "nas_drivers"
    __table_args__ = (Index("nas_drivers_by_study", "study_id", "ended_at"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("nas_studies.id"))
    name: Mapped[str]
    started_at: Mapped[float]
    lease_until: Mapped[float]
    ended_at: Mapped[float | None]


class LayoutRow(Base):
    __tablename__ = "nas_layouts"
    key: Mapped[str] = mapped_column(primary_key=True)
    text: Mapped[str]
    layers: Mapped[list[dict[str, Any]]]


class TrialRow(Base):
    __tablename__ = "nas_trials"
    __table_args__ = (
        UniqueConstraint("study_id", "number"),
        CheckConstraint(
            "state IN ({})".format(", ".join(f"'{state}'" for state in STATES)), name="nas_trial_state"
        ),
        Index("nas_trials_by_state", "study_id", "state", "number"),
        Index("nas_trials_by_layout", "study_id", "layout_key"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("nas_studies.id"))
    number: Mapped[int]
    state: Mapped[str]
    origin: Mapped[str]
    layout_key: Mapped[str] = mapped_column(ForeignKey("nas_layouts.key"))
    params: Mapped[dict[str, Any]]
    sampler_attrs: Mapped[dict[str, Any]]
    costs: Mapped[dict[str, Any]]
    layer_costs: Mapped[list[dict[str, Any]]]
    evaluation_key: Mapped[str] = mapped_column(index=True)
    attempts: Mapped[int]
    why: Mapped[str]
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    ended_at: Mapped[float | None]
    driver_id: Mapped[int | None] = mapped_column(ForeignKey("nas_drivers.id", name="nas_trial_driver"))
    failures: Mapped[int] = mapped_column(server_default="0")


class ResultRow(Base):
    __tablename__ = "nas_results"
    trial_id: Mapped[int] = mapped_column(ForeignKey("nas_trials.id"), primary_key=True)
    rung: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    quality: Mapped[float]
    scores: Mapped[dict[str, Any]]
    details: Mapped[dict[str, Any]]
    steps: Mapped[int]
    tokens: Mapped[int]
    train_s: Mapped[float]
    worker_s: Mapped[float]
    seed: Mapped[int]


class PointRow(Base):
    """What a done trial has on its study's axes: its number and then each value, as doubles with the lowest byte first."""

    __tablename__ = "nas_points"
    study_id: Mapped[int] = mapped_column(ForeignKey("nas_studies.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    packed: Mapped[bytes]


class RepeatRow(Base):
    __tablename__ = "nas_repeats"
    trial_id: Mapped[int] = mapped_column(ForeignKey("nas_trials.id"), primary_key=True)
    seed: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    evaluation_key: Mapped[str] = mapped_column(index=True)
    rung: Mapped[int]
    quality: Mapped[float]
    scores: Mapped[dict[str, Any]]
    details: Mapped[dict[str, Any]]
    steps: Mapped[int]
    tokens: Mapped[int]
    train_s: Mapped[float]
    worker_s: Mapped[float]


class RepeatClaimRow(Base):
    __tablename__ = "nas_repeat_claims"
    trial_id: Mapped[int] = mapped_column(ForeignKey("nas_trials.id"), primary_key=True)
    seed: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    driver_id: Mapped[int] = mapped_column(ForeignKey("nas_drivers.id"))


class LatencyRow(Base):
    __tablename__ = "nas_latencies"
    device: Mapped[str] = mapped_column(primary_key=True)
    frame: Mapped[str] = mapped_column(primary_key=True)
    subject: Mapped[str] = mapped_column(primary_key=True)
    phase: Mapped[str] = mapped_column(primary_key=True)
    whole: Mapped[bool] = mapped_column(primary_key=True)
    latency_ms: Mapped[float]
    spread_ms: Mapped[float]
    repetitions: Mapped[int]


class EventRow(Base):
    __tablename__ = "nas_events"
    __table_args__ = (
        Index("nas_events_by_study", "study_id", "seq"),
        {"sqlite_autoincrement": True},  # a number is never given twice, even after a deletion
    )
    seq: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float]
    study_id: Mapped[int | None] = mapped_column(ForeignKey("nas_studies.id"))
    kind: Mapped[str]
    payload: Mapped[dict[str, Any]]
