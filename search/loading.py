"""Loading the model that a search is about, with its engine, and profiles, in this process or in a worker's."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from layerskip.checkpoints import load_checkpoint
from layerskip.engine import Engine, compile_sublayers, make_engine
from layerskip.model import LayerSkipModel
from layerskip.profile import DraftProfile
from layerskip.ready_profiles import load_profile


def load_engine(source: str, device: str, dtype: str, engine: str, compiled: bool) -> Engine:
    """The engine of a model by where that comes from, as :func:`engine_of` makes it."""
    return engine_of(load_checkpoint(source, device=device, dtype=dtype).model, engine, compiled)


def engine_of(hf_model: PreTrainedModel, engine: str, compiled: bool) -> Engine:
    """An engine, by its name, for a loaded model, whose sublayers are compiled if asked."""
    model = LayerSkipModel(hf_model)
    if compiled:
        compile_sublayers(model)
    return make_engine(model, engine)


def load_profiles(sources: Sequence[str], device: str, dtype: str) -> dict[str, DraftProfile]:
    """Profiles by where they come from, as :func:`layerskip.load_profile` loads them."""
    return {source: load_profile(source, device=device, dtype=dtype) for source in sources}
