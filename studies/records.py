"""Measurements of a study, prompt by prompt, in a table beside Optuna's."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import DateTime, Engine, String, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from studies.retry import RetryOnDisconnect


class Table(DeclarativeBase):
    """Base of the tables that we keep beside Optuna's."""


class MeasurementRecord(Table):
    """A prompt decoded by plain decoding and with a trial's candidate.

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
        accepted: Proposed tokens that were accepted.
        near_tie: Whether the outputs diverge at a near-tie.
        disturbed: Whether the times are uncertain, because the machine was busy.
        measured_at: When, in UTC.
    """

    __tablename__ = "layerskip_prompt_measurements"

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
    disturbed: Mapped[bool] = mapped_column(default=False)
    measured_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=lambda: datetime.now(UTC))


class MeasurementTable:
    """The measurements in a study's database.

    Args:
        engine: Of that database.
        retry: Runs its operations.
    """

    def __init__(self, engine: Engine, retry: RetryOnDisconnect) -> None:
        self._engine = engine
        self._retry = retry

    def add(self, record: MeasurementRecord) -> None:
        """Store a measurement, in a transaction of its own; once, even if the connection is lost.

        Raises:
            StorageError: The database refused, or was away for too long.
        """
        values = {column.key: getattr(record, column.key) for column in MeasurementRecord.__table__.columns}
        values = {name: value for name, value in values.items() if value is not None}

        def insert(repeated: bool) -> None:
            with Session(self._engine) as session, session.begin():
                if not (repeated and _is_stored(session, values)):
                    session.add(MeasurementRecord(**values))

        self._retry(insert)

    def of(self, study: str) -> Sequence[MeasurementRecord]:
        """All measurements of a study, in the order in which they were made.

        Raises:
            StorageError: The database refused, or was away for too long.
        """
        query = select(MeasurementRecord).where(MeasurementRecord.study == study).order_by(MeasurementRecord.id)

        def read(_: bool) -> Sequence[MeasurementRecord]:
            with Session(self._engine) as session:
                return session.scalars(query).all()

        return self._retry(read)


def _is_stored(session: Session, values: dict[str, Any]) -> bool:
    """Whether a measurement is there already: no two take the same time to the last bit."""
    identifying = {name: value for name, value in values.items() if name != "measured_at"}
    return session.scalar(select(MeasurementRecord.id).filter_by(**identifying).limit(1)) is not None
