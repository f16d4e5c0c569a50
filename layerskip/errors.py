"""Errors that a user can act on. Each message is one line: the thing, what is wrong, what to do."""


class LayerSkipError(Exception):
    """Base of every error that layerskip raises on purpose."""


class InvalidInputError(LayerSkipError, ValueError):
    """An argument, a prompt or an option cannot be used as it is."""


class InvalidProfileError(LayerSkipError, ValueError):
    """A draft profile cannot be read, or does not belong to the model it was given."""


class UnsupportedModelError(LayerSkipError):
    """The model is of a kind that layerskip cannot take apart into sublayers."""


class CheckpointError(LayerSkipError):
    """A model could not be found or loaded."""


class HubError(LayerSkipError):
    """The hub cannot be reached, or has not, or does not give, what was asked of it."""


class ExportError(LayerSkipError):
    """A draft cannot become a checkpoint of its own, or not in that folder."""


class MissingDependencyError(LayerSkipError):
    """An optional package is needed for what was asked."""


class LosslessnessError(LayerSkipError):
    """Self-speculative decoding gave other tokens than plain decoding: a bug in layerskip, not a slow draft."""
