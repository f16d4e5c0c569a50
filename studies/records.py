"""What is recorded beside Optuna's tables: every prompt's measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

from optuna.storages import BaseStorage
from sqlalchemy import DateTime, Engine, String, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from studies.retry import retry_on_disconnect
from studies.storage_errors import storage_error

T = TypeVar("T")


class _Base(DeclarativeBase):
    pass


class MeasurementRecord(_Base):
    """One prompt decoded plainly and with one trial's candidate.

    Attributes:
        study: Name of the study.
        trial: Number of the trial in it.
        prompt: Id of the prompt.
        prompt_set: ``search`` or ``held-out``.
        plain_seconds: Time of plain decoding, prefill included.
        draft_seconds: Time of self-speculative decoding, prefill included.
        tokens: Tokens of plain decoding.
        draft_tokens: Tokens of self-speculative decoding.
        drafted: Tokens proposed.
        accepted: Proposed tokens that stood.
        near_tie: Whether the outputs part at a near-tie.
        measured_at: When, in UTC.
    """

    __tablename__ = "layerskip_measurements"

    id: Mapped[int] = mapped_column(primary_key=True)
    study: Mapped[str] = mapped_column(String(512), index=True)
    trial: Mapped[int]
    prompt: Mapped[str] = mapped_column(String(64))
    prompt_set: Mapped[str] = mapped_column(String(16))
    plain_seconds: Mapped[float]
    draft_seconds: Mapped[float]
    tokens: Mapped[int]
    draft_tokens: Mapped[int]
    drafted: Mapped[int]
    accepted: Mapped[int]
    near_tie: Mapped[bool]
    measured_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=lambda: datetime.now(UTC))


def create_tables(engine: Engine) -> None:
    """Make the tables that are not there yet."""
    _Base.metadata.create_all(engine)


class Records(Protocol):
    """Where measurements are kept."""

    def add(self, record: MeasurementRecord) -> None:
        """Keep one measurement."""

    def of(self, study: str) -> Sequence[MeasurementRecord]:
        """All measurements of a study, in the order in which they were made."""


class TableOfRecords:
    """Measurements in a table of the study's own database.

    Args:
        engine: Of that database. A server that is away is waited for.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, record: MeasurementRecord, *, repeated: bool = False) -> None:
        """Keep one measurement, in a transaction of its own; once, though the connection may break.

        Args:
            record: The measurement.
            repeated: Whether it may have been added before.
        """
        values = values_of(record)

        def insert(again: bool) -> None:
            with Session(self._engine) as session, session.begin():
                if not ((repeated or again) and _is_there(session, values)):
                    session.add(MeasurementRecord(**values))

        self._persist(insert)

    def of(self, study: str) -> Sequence[MeasurementRecord]:
        """All measurements of a study, in the order in which they were made."""
        query = select(MeasurementRecord).where(MeasurementRecord.study == study).order_by(MeasurementRecord.id)

        def read(_: bool) -> Sequence[MeasurementRecord]:
            with Session(self._engine) as session:
                return session.scalars(query).all()

        return self._persist(read)

    def _persist(self, operation: Callable[[bool], T]) -> T:
        try:
            return retry_on_disconnect(operation)
        except SQLAlchemyError as error:
            raise storage_error(self._engine.url, error) from error


def values_of(record: MeasurementRecord) -> dict[str, Any]:
    """What a record says, by column; what it leaves open is left out."""
    values = {column.key: getattr(record, column.key) for column in MeasurementRecord.__table__.columns}
    return {name: value for name, value in values.items() if value is not None}


def _is_there(session: Session, values: dict[str, Any]) -> bool:
    """Whether a measurement is kept already: no two take the same time to the last bit."""
    told = {name: value for name, value in values.items() if name != "measured_at"}
    return session.scalar(select(MeasurementRecord.id).filter_by(**told).limit(1)) is not None


def records_of(storage: BaseStorage) -> Records:
    """The measurements that are kept beside the studies of a storage that ``open_storage`` opened."""
    records: Records = storage.records  # type: ignore[attr-defined]
    return records


def add_measurement(storage: BaseStorage, record: MeasurementRecord) -> None:
    """Keep one measurement, at once and for good.

    Raises:
        StorageError: The storage refused, or was away for longer than patience lasts.
    """
    records_of(storage).add(record)


def measurements_of(storage: BaseStorage, study: str) -> Sequence[MeasurementRecord]:
    """All measurements of a study, in the order in which they were made."""
    return records_of(storage).of(study)
