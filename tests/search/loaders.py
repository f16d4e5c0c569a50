"""What workers in other processes load; they find it by its name."""

import itertools
import os
import time
from pathlib import Path

import search.search as preparation
import search.search as study_module
from layerskip import LayerSkipModel
from layerskip.engine import EagerEngine
from layerskip.errors import LayerSkipError
from search.predict import SpeedupPredictor
from search.warm_starts import warm_starts
from tests.models import tiny_llama
from tests.search.searches import known_costs_of

STARTS = 3


def quick_engine():
    """The engine of a tiny model, and costs and starts that need no time."""
    preparation.measure_costs = known_costs_of
    study_module.warm_starts = lambda *parts: itertools.islice(warm_starts(*parts), STARTS)
    return EagerEngine(LayerSkipModel(tiny_llama()))


def slow_engine(folder):
    """An engine with which looking at a candidate never ends; tells so by a file named after the process."""

    def predict(*arguments, **named):
        (Path(folder) / str(os.getpid())).touch()
        time.sleep(3600)

    SpeedupPredictor.predict = predict
    return quick_engine()


def no_engine():
    raise LayerSkipError("model 'lost': no such file or folder")


def other_engine():
    """Of another dtype than the study was made with."""
    return EagerEngine(LayerSkipModel(quick_engine().model.hf_model.bfloat16()))


def broken_engine():
    os._exit(7)
