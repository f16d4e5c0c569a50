"""Loading the model that a search is about, with its engine, and profiles, in this process or in a worker's."""

from __future__ import annotations

from collections.abc import Sequence

from layerskip.checkpoints import load_checkpoint
from layerskip.engine import Engine, compile_sublayers, make_engine
from layerskip.model import LayerSkipModel
from layerskip.profile import DraftProfile
from layerskip.ready_profiles import load_profile


def load_engine(source: str, device: str, dtype: str, engine: str, compiled: bool) -> Engine:
    """Load a model and make its engine.

    Args:
        source: As :func:`layerskip.load_checkpoint` takes it.
        device: Likewise.
        dtype: Likewise.
        engine: Name of the engine.
        compiled: Whether to compile the sublayers.
    """
    model = LayerSkipModel(load_checkpoint(source, device=device, dtype=dtype).model)
    if compiled:
        compile_sublayers(model)
    return make_engine(model, engine)


def load_profiles(sources: Sequence[str], device: str, dtype: str) -> dict[str, DraftProfile]:
    """Profiles by where they come from, as :func:`layerskip.load_profile` loads them."""
    return {source: load_profile(source, device=device, dtype=dtype) for source in sources}
