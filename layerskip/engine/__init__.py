"""Engines: how a pass runs. Drafting, verification and decoding know only :class:`Engine`."""

from layerskip.costs import PassCosts
from layerskip.engine.base import DraftStep, Engine, Scored, SharedPrefix, check_is_engine, highest_probability
from layerskip.engine.compilation import compile_sublayers
from layerskip.engine.cost_measurement import load_costs, measure_costs, measure_passes
from layerskip.engine.cuda_graphs import GraphEngine
from layerskip.engine.eager import EagerEngine
from layerskip.engine.kernel_measurement import seconds_saved_by_bfloat16
from layerskip.engine.packed import PackedEngine
from layerskip.engine.selection import check_engine, make_engine, on_one_cuda_device

__all__ = [
    "DraftStep",
    "EagerEngine",
    "Engine",
    "GraphEngine",
    "PackedEngine",
    "PassCosts",
    "Scored",
    "SharedPrefix",
    "check_engine",
    "check_is_engine",
    "compile_sublayers",
    "highest_probability",
    "load_costs",
    "make_engine",
    "measure_costs",
    "measure_passes",
    "on_one_cuda_device",
    "seconds_saved_by_bfloat16",
]
