"""A search that stops moving in the middle of a trial, for a test to kill it there."""

import itertools
import time
from pathlib import Path

import torch

import search.search as search_module
from layerskip import LayerSkipModel
from search.callbacks import PromptMeasured, ignore
from search.predict import SpeedupPredictor
from search.warm_starts import warm_starts
from studies.storage import open_storage
from tests.models import tiny_llama
from tests.search.searches import known_costs_of, small_search

STUDY, STARTS, TRIALS, HEARTBEAT_SECONDS = "killed", 3, 6, 1


def search(url, folder, on_event=ignore):
    """Three starts, then measurements and what the sampler proposes."""
    search_module.measure_costs = known_costs_of
    search_module.warm_starts = lambda *parts: itertools.islice(warm_starts(*parts), STARTS)
    storage = open_storage(url, heartbeat_seconds=HEARTBEAT_SECONDS)
    settings = {"trials": TRIALS, "measuring_share": 1.0, "finalists": 1}
    model = LayerSkipModel(tiny_llama())
    return small_search(model, storage, study=STUDY, folder=Path(folder), on_event=on_event, **settings)


def stand_still_in(doing, url, folder, said):
    """Search, and stand still while the third candidate is predicted or after the first prompt that was measured.

    Args:
        doing: ``predicting`` or ``measuring``.
        url: Of the storage.
        folder: Of reference texts and locks.
        said: The end of a pipe that is told when the search stands still.
    """

    def stand_still():
        said.send("in the middle of a trial")
        time.sleep(3600)

    def on_event(event):
        if doing == "measuring" and isinstance(event, PromptMeasured) and event.done:
            stand_still()

    original, predicted = SpeedupPredictor.predict, []

    def predict(*arguments, **named):
        predicted.append(1)
        return stand_still() if len(predicted) == 3 else original(*arguments, **named)

    if doing == "predicting":
        SpeedupPredictor.predict = predict
    torch.set_num_threads(1)
    search(url, folder, on_event).run()
