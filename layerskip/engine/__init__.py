"""How a step runs: the one place that decides it. Drafting, verification and decoding know only :class:`Engine`."""

from layerskip.engine.choice import ENGINES, check_engine, use_engine
from layerskip.engine.compilation import compile_sublayers
from layerskip.engine.costs import PassCosts, calibrate, load_costs, measure_costs
from layerskip.engine.eager import EagerEngine
from layerskip.engine.graphs import GraphEngine
from layerskip.engine.interface import DraftStep, Engine, Scored, SharedPrefix, highest_probability

__all__ = [
    "ENGINES",
    "DraftStep",
    "EagerEngine",
    "Engine",
    "GraphEngine",
    "PassCosts",
    "Scored",
    "SharedPrefix",
    "calibrate",
    "check_engine",
    "compile_sublayers",
    "highest_probability",
    "load_costs",
    "measure_costs",
    "use_engine",
]
