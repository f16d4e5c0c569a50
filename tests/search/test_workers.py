"""Several processes on one study."""

import os
import signal
import threading
import time
from functools import partial

import pytest
from optuna.trial import TrialState

import search.search as search_module
from search.callbacks import TrialFinished
from search.space import SearchSpace
from search.workers import Workers
from studies.ranking import SOURCE_KEY, candidate_key, evaluated_trials, measured_trials
from studies.storage import open_storage
from studies.study import load_study
from tests.models import LAYERS
from tests.processes import processes
from tests.search.loaders import STARTS, load_and_die, load_nothing, load_other, load_quick, load_slow, quick_engine
from tests.search.searches import CtrlC, Log, small_search
from tests.trained import layer_profile

TRIALS = 24


@pytest.fixture(autouse=True)
def search_as_it_was(monkeypatch):
    """What loading a model changes in this process is changed back."""
    monkeypatch.setattr(search_module, "measure_costs", search_module.measure_costs)
    monkeypatch.setattr(search_module, "warm_starts", search_module.warm_starts)


@pytest.fixture
def forked(monkeypatch):
    """Workers are forked from a process that has imported everything, instead of importing it for seconds each."""
    monkeypatch.setattr("search.workers.multiprocessing.get_context", lambda _: processes)


@pytest.fixture
def search_with(database, tmp_path):
    """A search of which other workers load their models by some loaders, and what was said of those that failed."""
    failures = []

    def make(*loads, profiles=(), **named):
        engine, draft_layers = load_quick(profiles)
        settings = {"trials": TRIALS, "workers": 1 + len(loads), "study": "s", "finalists": 1} | named

        def workers_on(task):
            return Workers(loads, task, database, lambda number, message: failures.append((number, message)))

        space = SearchSpace(LAYERS, draft_layers=tuple(layer.ref for layer in draft_layers))
        own = {"space": space, "draft_layers": draft_layers, "folder": tmp_path, "other_workers": workers_on}
        return small_search(engine.model, open_storage(database), **own, **settings), failures

    return make


def the_study(database):
    return load_study(open_storage(database), "s")


class WaitsForOthers(Log):
    """Lets the first worker finish no second trial before the others have begun some."""

    def __init__(self, database):
        super().__init__()
        self._database = database

    def __call__(self, event):
        super().__call__(event)
        if not isinstance(event, TrialFinished):
            return
        deadline = time.monotonic() + 120
        while len(begun(self._database)) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)


def begun(database):
    return [trial for trial in the_study(database).trials if trial.state != TrialState.WAITING]


def test_three_workers_look_at_candidates_and_measure_without_getting_in_each_other_s_way(search_with, database, capfd):
    log = WaitsForOthers(database)
    search, failures = search_with(load_quick, load_quick, measuring_share=0.3, on_event=log)
    result = search.run()
    assert failures == []
    study = the_study(database)
    looked_at = evaluated_trials(study)
    assert TRIALS <= len(looked_at) <= TRIALS + 3
    assert result.trials == len(looked_at)
    assert {trial.state for trial in study.trials} <= {TrialState.COMPLETE, TrialState.WAITING, TrialState.PRUNED}
    assert len(log.of(TrialFinished)) < len(begun(database))  # the others did their part
    enqueued = [trial for trial in looked_at if SOURCE_KEY in trial.user_attrs]
    assert len(enqueued) == len({candidate_key(trial) for trial in enqueued}) == STARTS
    # Two workers may propose the same at the same moment; neither waits for the other.
    assert len({candidate_key(trial) for trial in looked_at}) >= len(looked_at) - 4
    measured = [candidate_key(trial) for trial in measured_trials(study)]
    assert len(set(measured)) == len(measured)
    errors = capfd.readouterr().err
    assert "Trial" not in errors  # where the first worker's Optuna is silent, all are
    assert "pytree" not in errors  # and the notices of libraries
    assert "torchao" not in errors


@pytest.mark.usefixtures("forked")
def test_workers_have_the_draft_layers_of_the_first_worker(search_with, database, tmp_path):
    file = str(tmp_path / "tuned.json")
    layer_profile(quick_engine().model, start=4).save(file)
    log = WaitsForOthers(database)
    search, failures = search_with(partial(load_quick, [file]), profiles=[file], trials=16, on_event=log)
    result = search.run()
    assert failures == []
    assert 16 <= result.trials <= 17
    study = the_study(database)
    assert len(log.of(TrialFinished)) < len(begun(database))
    assert {trial.params["draft_layer"] for trial in evaluated_trials(study)} == {0, 1}


@pytest.mark.usefixtures("forked")
def test_workers_that_give_up_are_reported_and_the_others_continue(search_with):
    search, failures = search_with(load_nothing, load_and_die, load_other, trials=STARTS + 2)
    result = search.run()
    assert result.trials == STARTS + 2
    (first, lost), (second, broken), (third, differs) = sorted(failures)
    assert (first, second, third) == (1, 2, 3)
    assert (lost, broken) == ("model 'lost': no such file or folder", "ended with exit code 7")
    assert differs.startswith(
        "study 's': cannot be resumed, because this differs: dtype (study: float32, now: bfloat16)"
    )


@pytest.mark.usefixtures("interruptible", "forked")
def test_ctrl_c_ends_all_workers_and_what_they_had_in_hand_is_tried_again(search_with, database, tmp_path, monkeypatch):
    looking = tmp_path / "looking"
    looking.mkdir()
    planning = threading.Event()

    def plan_for_ever(*_):
        planning.set()
        time.sleep(3600)

    def press_when_all_look():
        deadline = time.monotonic() + 120
        while len(list(looking.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        planning.wait(120)  # elsewhere a finalizer might swallow the exception
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("search.workers._SECONDS_TO_END", 120)  # none is killed, however busy the machine is
    search, failures = search_with(partial(load_slow, str(looking)), partial(load_slow, str(looking)))
    monkeypatch.setattr(search_module.MeasuringPruner, "revisit", plan_for_ever)
    threading.Thread(target=press_when_all_look, daemon=True).start()
    result = search.run()
    assert (result.interrupted, result.trials, failures) == (True, 1, [])
    for pid in looking.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.name), 0)
    trials = the_study(database).trials
    broken = [trial for trial in trials if trial.state == TrialState.FAIL]
    assert len(broken) == 2
    waiting = [t.system_attrs["fixed_params"] for t in trials if t.state == TrialState.WAITING]
    assert all(trial.params in waiting for trial in broken)
    assert not [trial for trial in trials if trial.state == TrialState.RUNNING]


@pytest.mark.usefixtures("forked")
def test_an_error_in_the_first_worker_ends_the_others(tmp_path):
    task = small_search(quick_engine().model, open_storage("sqlite://")).task
    load = partial(load_slow, str(tmp_path))
    with Workers([load], task, "sqlite://", lambda *_: pytest.fail("not its fault")) as workers:
        [(process, _)] = workers._running
        workers.__exit__(RuntimeError, RuntimeError(), None)
        assert not process.is_alive()


@pytest.fixture
def workers():
    """Workers by some loaders, and what is reported of them."""
    task = small_search(quick_engine().model, open_storage("sqlite://")).task

    def make(*loads):
        reported = []
        return Workers(loads, task, "sqlite://", lambda *failure: reported.append(failure)), reported

    return make


def ended(process):
    process.join(120)
    return not process.is_alive()


@pytest.mark.usefixtures("forked")
def test_a_worker_that_failed_is_reported_once_while_the_others_work(workers, tmp_path):
    started, reported = workers(load_nothing, partial(load_slow, str(tmp_path)), load_and_die)
    with started:
        (lost, _), (slow, _), (dead, _) = started._running
        assert ended(lost)
        assert ended(dead)
        started.check()
        assert reported == [(1, "model 'lost': no such file or folder"), (3, "ended with exit code 7")]
        assert slow.is_alive()
        started.check()
        started.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert len(reported) == 2  # that the search ended a worker is no failure of it


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_worker_that_failed_is_reported_where_the_first_process_ends_early_too(workers, error):
    started, reported = workers(load_nothing)
    with started:
        [(process, _)] = started._running
        assert ended(process)
        started.__exit__(error, error(), None)
    assert reported == [(1, "model 'lost': no such file or folder")]


def test_a_search_without_other_workers_starts_no_process():
    with Workers([], None, "sqlite://", lambda *_: pytest.fail("there is none")) as workers:
        assert workers._running == []


@pytest.mark.usefixtures("forked")
def test_ctrl_c_in_a_callback_ends_workers_that_are_still_loading(search_with):
    search, failures = search_with(load_quick, on_event=CtrlC(TrialFinished))
    result = search.run()
    assert (result.interrupted, failures) == (True, [])
