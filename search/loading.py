"""Loading the model that a search is about, and profiles, in this process or in a worker's."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from layerskip.checkpoints import load_checkpoint
from layerskip.engine import compile_sublayers, use_engine
from layerskip.model import LayerSkipModel
from layerskip.profile import DraftProfile
from layerskip.ready_profiles import load_profile


def load_model(source: str, device: str, dtype: str, engine: str, compiled: bool) -> LayerSkipModel:
    """A model by where it comes from, as :func:`wrapped` makes it."""
    return wrapped(load_checkpoint(source, device=device, dtype=dtype).model, engine, compiled)


def wrapped(hf_model: PreTrainedModel, engine: str, compiled: bool) -> LayerSkipModel:
    """A loaded model, with an engine by its name, its sublayers compiled if asked."""
    model = LayerSkipModel(hf_model)
    if compiled:
        compile_sublayers(model)
    use_engine(model, engine)
    return model


def load_profiles(sources: Sequence[str], device: str, dtype: str) -> dict[str, DraftProfile]:
    """Profiles by where they come from, as :func:`layerskip.load_profile` loads them."""
    return {source: load_profile(source, device=device, dtype=dtype) for source in sources}
