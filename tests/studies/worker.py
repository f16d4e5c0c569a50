"""A worker of a fleet: runs trials of a study on a storage of ours, with an objective that costs next to nothing."""

import os
import threading
import time
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait

import optuna

from layerskip.errors import LayerSkipError
from studies.records import MeasurementRecord
from studies.storage import open_storage
from studies.trial_loop import run_trials
from tests.processes import processes


def measurement(study, trial, seconds):
    """The record of a prompt that a trial measured."""
    counts = dict.fromkeys(["tokens", "draft_tokens", "drafted", "accepted"], 1)
    return MeasurementRecord(
        study=study, trial=trial, prompt="p", prompt_set="search", plain_seconds=seconds, draft_seconds=1.0,
        near_tie=False, **counts,
    )  # fmt: skip


def work(url, study_name, trials, seconds, stand_still_at, heartbeat_seconds, said):
    """Finish so many trials of a study, and say through a pipe what happens.

    Args:
        url: Of the storage.
        study_name: Of the study, which is made if it is not there.
        trials: How many to finish.
        seconds: That each takes, at least.
        stand_still_at: Which of them to stand still in for ever, counted from 0; None for none of them.
        heartbeat_seconds: How often a running trial says that it lives.
        said: The end of a pipe.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    done = []

    def objective(trial):
        x = trial.suggest_float("x", 0, 1)
        said.send(("began", os.getpid(), trial.number))
        if len(done) == stand_still_at:
            threading.Event().wait()
        time.sleep(seconds)
        storage.records.add(measurement(study_name, trial.number, x))
        trial.set_user_attr("pid", os.getpid())
        return x

    try:
        storage = open_storage(url, heartbeat_seconds=heartbeat_seconds)
        sampler = optuna.samplers.RandomSampler()
        study = optuna.create_study(study_name=study_name, storage=storage, load_if_exists=True, sampler=sampler)
        for trial in run_trials(study, objective, storage.heartbeats):
            done.append(trial.number)
            said.send(("finished", os.getpid(), trial.number))
            if len(done) == trials:
                break
    except LayerSkipError as error:
        said.send(("failed", os.getpid(), str(error)))


class Fleet:
    """Worker processes, and what they said.

    Each has a pipe of its own: one that is killed while it speaks silences no other.
    """

    def __init__(self):
        self.processes = []
        self.events = []
        self._pipes = []

    def start(self, url, trials, *, study="s", seconds=0.0, stand_still_at=None, heartbeat_seconds=1):
        hears, says = processes.Pipe(duplex=False)
        arguments = (url, study, trials, seconds, stand_still_at, heartbeat_seconds, says)
        process = processes.Process(target=work, args=arguments, daemon=True)
        process.start()
        says.close()
        self.processes.append(process)
        self._pipes.append(hears)
        return process

    def wait_for(self, event, count=1):
        """Wait until so many more events of a name were said."""
        while count:
            assert self._pipes, f"all workers ended: {self.events}"
            count -= sum(name == event for name, *_ in self._listen())

    def wait(self):
        """Wait until every worker that lives has ended by itself."""
        while self._pipes:
            self._listen()
        for process in self.processes:
            process.join()
        assert {process.exitcode for process in self.processes} <= {0, -9}

    def _listen(self):
        heard = []
        for pipe in wait(self._pipes):
            try:
                heard.append(pipe.recv())
            except (EOFError, OSError):  # that worker has ended
                self._pipes.remove(pipe)
        assert not [event for event in heard if event[0] == "failed"], heard
        self.events += heard
        return heard

    def numbers(self, event):
        """The trials of all events of a name, in order of trial."""
        return sorted(number for name, _, number in self.events if name == event)


@contextmanager
def fleet():
    """A fleet without workers; those that still live in the end are killed."""
    workers = Fleet()
    try:
        yield workers
    finally:
        for process in workers.processes:
            with suppress(ValueError):
                process.kill()
