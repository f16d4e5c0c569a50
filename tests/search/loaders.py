"""How workers in other processes load models; they find it by its name."""

import itertools
import os
import time
from pathlib import Path

import search.search as search_module
from layerskip import LayerSkipModel
from layerskip.engine import EagerEngine
from layerskip.errors import LayerSkipError
from search.draft_layers import trained_draft_layers
from search.loading import load_profiles
from search.predict import SpeedupPredictor
from search.warm_starts import warm_starts
from tests.models import tiny_llama
from tests.search.searches import known_costs_of

STARTS = 3


def quick_engine():
    """The engine of a tiny model, and costs and starts that need no time."""
    search_module.measure_costs = known_costs_of
    search_module.warm_starts = lambda *parts: itertools.islice(warm_starts(*parts), STARTS)
    return EagerEngine(LayerSkipModel(tiny_llama()))


def load_quick(profiles=()):
    """Without delay, with the draft layers of some profiles."""
    engine = quick_engine()
    return engine, trained_draft_layers(load_profiles(profiles, "cpu", "float32"), engine.model)


def load_slow(folder):
    """So that looking at a candidate never ends; tells so by a file named after the process."""

    def predict(*arguments, **named):
        (Path(folder) / str(os.getpid())).touch()
        time.sleep(3600)

    SpeedupPredictor.predict = predict
    return load_quick()


def load_nothing():
    raise LayerSkipError("model 'lost': no such file or folder")


def load_other():
    """Of another dtype than the study was made with."""
    return EagerEngine(LayerSkipModel(quick_engine().model.hf_model.bfloat16())), ()


def load_and_die():
    os._exit(7)
