"""A search that stops moving in the middle of a trial, for a test to kill it there.

Usage: python -m tests.search.killable_search STORAGE_URL FOLDER looking|measuring
"""

import itertools
import sys
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


def stand_still(*_):
    print("in the middle of a trial", flush=True)
    time.sleep(3600)


def stand_still_measuring(event):
    """Stand still at the first prompt that was measured."""
    if isinstance(event, PromptMeasured) and event.done:
        stand_still()


def stand_still_looking():
    """Stand still when the third candidate is looked at."""
    original, looked = SpeedupPredictor.predict, []

    def predict(*arguments, **named):
        looked.append(1)
        return stand_still() if len(looked) == 3 else original(*arguments, **named)

    SpeedupPredictor.predict = predict


if __name__ == "__main__":
    torch.set_num_threads(1)
    url, folder, doing = sys.argv[1:]
    if doing == "looking":
        stand_still_looking()
    search(url, folder, stand_still_measuring if doing == "measuring" else ignore).run()
