"""What is recorded beside Optuna's tables: every prompt's measurement."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from sqlalchemy import DateTime, Engine, String, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column


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


def add_measurement(engine: Engine, record: MeasurementRecord) -> None:
    """Keep one measurement, in a transaction of its own."""
    with Session(engine) as session, session.begin():
        session.add(record)


def count_measurements(engine: Engine, study: str) -> int:
    """How many measurements a study has."""
    with Session(engine) as session:
        query = select(func.count()).select_from(MeasurementRecord).where(MeasurementRecord.study == study)
        return session.scalar(query) or 0


def measurements_of(engine: Engine, study: str) -> Sequence[MeasurementRecord]:
    """All measurements of a study, in the order in which they were made."""
    with Session(engine) as session:
        query = select(MeasurementRecord).where(MeasurementRecord.study == study).order_by(MeasurementRecord.id)
        return session.scalars(query).all()
