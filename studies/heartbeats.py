"""Heartbeats of running trials, which tell the trials of dead workers from those of living ones."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any, cast

import optuna
from optuna.trial import TrialState
from sqlalchemy import CursorResult, DateTime, Engine, String, delete, func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Mapped, Session, mapped_column

from studies.records import Table
from studies.retry import RetryOnDisconnect

# What a heartbeat may be late by, in addition to the interval: databases' clocks may show whole seconds.
_SLACK_SECONDS = 1.0


class Heartbeat(Table):
    """The last heartbeat of a trial, by the database's clock."""

    __tablename__ = "layerskip_heartbeats"

    study: Mapped[str] = mapped_column(String(512), primary_key=True)
    trial: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class Heartbeats:
    """Records heartbeats, and finds running trials without any.

    Optuna's own heartbeats fail every running trial when a database returns after an absence, or its clock jumps.

    Attributes:
        seconds: Between heartbeats. A trial that has been silent three times as long is suspected.

    Args:
        engine: The database.
        retry: Runs what must not fail for a lost connection.
        seconds: See above.
    """

    def __init__(self, engine: Engine, retry: RetryOnDisconnect, seconds: float) -> None:
        self._engine = engine
        self._retry = retry
        self.seconds = seconds

    @contextlib.contextmanager
    def beating(self, study: str, trial: int) -> Iterator[None]:
        """Record heartbeats of a trial while the block runs."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.is_set():
                self.record(study, trial)
                ended.wait(self.seconds)

        threading.Thread(target=beat, daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def record(self, study: str, trial: int) -> None:
        """Record a heartbeat, if the database can be reached: the next one comes soon enough."""
        with contextlib.suppress(SQLAlchemyError), Session(self._engine) as session, session.begin():
            heartbeat = session.get(Heartbeat, (study, trial)) or Heartbeat(study=study, trial=trial)
            heartbeat.at = func.now()
            session.add(heartbeat)

    def stale_trials(self, study: optuna.Study) -> list[int]:
        """Numbers of the running trials whose worker died: suspected, and still silent when a heartbeat was due.

        Trials whose database was away, or whose clock jumped, have recorded a heartbeat by then.

        Raises:
            StorageError: The database refused, or was away for too long.
        """
        suspected = self.silent_trials(study)
        if not suspected:
            return []
        time.sleep(self.seconds + _SLACK_SECONDS)
        return sorted(suspected & self.silent_trials(study))

    def claim(self, study: str, trial: int) -> bool:
        """Whether this process is to fail a stale trial: of several that try at the same moment, one is.

        A trial fails once, but a process that repeats its write after a lost connection cannot tell its own from
        another's. A row can be deleted once. If the process that deleted it dies before the trial has failed,
        the trial is given a heartbeat again, and is stale once more.

        Raises:
            StorageError: The database refused, or was away for too long.
        """
        chosen = (Heartbeat.study == study) & (Heartbeat.trial == trial)

        def delete_row(_: bool) -> bool:
            with Session(self._engine) as session, session.begin():
                deleted = cast("CursorResult[Any]", session.execute(delete(Heartbeat).where(chosen)))
                return deleted.rowcount == 1

        return self._retry(delete_row)

    def silent_trials(self, study: optuna.Study) -> set[int]:
        """Numbers of the running trials whose last heartbeat is long past.

        A trial that never had a heartbeat, because its worker died right at the start, is given one now.
        """
        running = {trial.number for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))}
        if not running:
            return set()
        ages = self._retry(lambda _: self._ages(study.study_name))
        for trial in running - ages.keys():
            self.record(study.study_name, trial)
        patience = timedelta(seconds=3 * self.seconds)
        return {trial for trial in running & ages.keys() if ages[trial] > patience}

    def _ages(self, study: str) -> dict[int, timedelta]:
        query = select(Heartbeat.trial, Heartbeat.at, func.now()).where(Heartbeat.study == study)
        with Session(self._engine) as session:
            return {trial: now - at for trial, at, now in session.execute(query)}
