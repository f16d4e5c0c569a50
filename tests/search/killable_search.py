"""A search that finishes some trials and then stands still in the middle of one, for a test to kill it there.

Usage: python -m tests.search.killable_search STORAGE_URL TRIALS_TO_FINISH
"""

import sys
import time

import torch

from layerskip import LayerSkipModel
from studies.storage import open_storage
from tests.models import tiny_llama
from tests.search.searches import Log, small_search

STUDY, TRIALS, HEARTBEAT_SECONDS = "killed", 4, 1


def search(url, observer=None):
    storage = open_storage(url, heartbeat_seconds=HEARTBEAT_SECONDS)
    return small_search(LayerSkipModel(tiny_llama()), storage, trials=TRIALS, study_name=STUDY, observer=observer)


class StandStill(Log):
    """After so many trials, says so on stdout at the first prompt of the next, and waits for ever."""

    def __init__(self, trials):
        super().__init__()
        self._trials = trials

    def prompt_measured(self, number, total):
        if sum(event == "trial_finished" for event, *_ in self.events) == self._trials:
            print("in the middle of a trial", flush=True)
            time.sleep(3600)


if __name__ == "__main__":
    torch.set_num_threads(1)
    search(sys.argv[1], StandStill(int(sys.argv[2]))).run()
