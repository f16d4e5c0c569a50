"""Loading the model that a search is about, in this process or in a worker's."""

from __future__ import annotations

from transformers import PreTrainedModel

from layerskip.checkpoints import load_checkpoint
from layerskip.engine import compile_sublayers, use_engine
from layerskip.stack.model import LayerSkipModel


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
