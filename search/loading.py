"""Load a model with its engine, and profiles with their draft layers, in this process or in a worker's."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from layerskip.checkpoints import load_checkpoint
from layerskip.engine import Engine, compile_sublayers, make_engine
from layerskip.model import LayerSkipModel
from layerskip.profile import DraftProfile
from layerskip.ready_profiles import load_profile
from search.draft_layers import TrainedDraftLayer, trained_draft_layers


def load_for_worker(
    source: str, device: str, dtype: str, engine: str, compiled: bool, profiles: Sequence[str]
) -> tuple[Engine, Sequence[TrainedDraftLayer]]:
    """What :class:`search.workers.Workers` loads: the engine of a model, and the draft layers of some profiles.

    Args:
        source: Where the model comes from.
        device: As in :func:`layerskip.load_checkpoint`.
        dtype: Likewise.
        engine: As in :func:`engine_of`.
        compiled: Likewise.
        profiles: Where the profiles come from.
    """
    runner = engine_of(load_checkpoint(source, device=device, dtype=dtype).model, engine, compiled)
    return runner, trained_draft_layers(load_profiles(profiles, device, dtype), runner.model)


def engine_of(hf_model: PreTrainedModel, engine: str, compiled: bool) -> Engine:
    """An engine, by its name, for a loaded model, whose sublayers are compiled if asked."""
    model = LayerSkipModel(hf_model)
    if compiled:
        compile_sublayers(model)
    return make_engine(model, engine)


def load_profiles(sources: Sequence[str], device: str, dtype: str) -> dict[str, DraftProfile]:
    """Profiles by where they come from, as :func:`layerskip.load_profile` loads them."""
    return {source: load_profile(source, device=device, dtype=dtype) for source in sources}
