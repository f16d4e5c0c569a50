"""What workers in other processes load; they find it by its name."""

import itertools
import os
import time
from pathlib import Path

import search.search as preparation
import search.search as study_module
from layerskip import LayerSkipModel
from layerskip.errors import LayerSkipError
from search.predict import SpeedupPredictor
from search.warm_starts import warm_starts
from tests.models import tiny_llama
from tests.search.searches import known_costs

STARTS = 3


def quick_model():
    """A tiny model, and costs and starts that need no time."""
    preparation.measure_latency = lambda model, space: known_costs(space)
    study_module.warm_starts = lambda *parts: itertools.islice(warm_starts(*parts), STARTS)
    return LayerSkipModel(tiny_llama())


def slow_model(folder):
    """A model with which looking at a candidate never ends; tells so by a file named after the process."""

    def predict(*arguments, **named):
        (Path(folder) / str(os.getpid())).touch()
        time.sleep(3600)

    SpeedupPredictor.predict = predict
    return quick_model()


def no_model():
    raise LayerSkipError("model 'lost': no such file or folder")


def other_model():
    """Of another dtype than the study was made with."""
    return LayerSkipModel(quick_model().hf_model.bfloat16())


def broken_model():
    os._exit(7)
