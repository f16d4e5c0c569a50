"""Load what a search works with: a model with its engine, and the draft layers of profiles."""

from __future__ import annotations

from collections.abc import Sequence

from layerskip.checkpoints import load_checkpoint
from layerskip.engine import Engine, compile_sublayers, make_engine
from layerskip.hub import load_profile
from layerskip.model import LayerSkipModel
from layerskip.profile import DraftProfile
from search.draft_layers import TrainedDraftLayer, trained_draft_layers


def load_for_worker(
    source: str, device: str, dtype: str, engine: str, compiled: bool, profiles: Sequence[str]
) -> tuple[Engine, Sequence[TrainedDraftLayer]]:
    """Load a model, make its engine, and load the draft layers of some profiles, for :class:`search.workers.Workers`.

    Args:
        source: As :func:`layerskip.load_checkpoint` takes it.
        device: Likewise.
        dtype: Likewise.
        engine: Name of the engine.
        compiled: Whether to compile the sublayers.
        profiles: As :func:`layerskip.load_profile` takes them.
    """
    model = LayerSkipModel(load_checkpoint(source, device=device, dtype=dtype).model)
    if compiled:
        compile_sublayers(model)
    return make_engine(model, engine, in_place=True), trained_draft_layers(
        load_profiles(profiles, device, dtype), model
    )


def load_profiles(sources: Sequence[str], device: str, dtype: str) -> dict[str, DraftProfile]:
    """Profiles by where they come from, as :func:`layerskip.load_profile` loads them."""
    return {source: load_profile(source, device=device, dtype=dtype) for source in sources}
