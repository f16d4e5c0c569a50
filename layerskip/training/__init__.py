"""Training what drafts: stand-ins for skipped sublayers, or heads; on the target model's own texts."""

from layerskip.training.data import (
    DataSettings,
    GivenPrompts,
    PromptSource,
    SelfWrittenPrompts,
    Shards,
    TuningData,
    TuningText,
    vocabulary_of,
)
from layerskip.training.evaluation import LOSSES, RANKS, Agreement, Loss
from layerskip.training.train import EvalResult, Trained, TrainingSettings, train
from layerskip.training.trainable_draft import TrainableDraft, trainable_bridge, trainable_heads, trainable_layer

__all__ = [
    "LOSSES",
    "RANKS",
    "Agreement",
    "DataSettings",
    "EvalResult",
    "GivenPrompts",
    "Loss",
    "PromptSource",
    "SelfWrittenPrompts",
    "Shards",
    "TrainableDraft",
    "Trained",
    "TrainingSettings",
    "TuningData",
    "TuningText",
    "train",
    "trainable_bridge",
    "trainable_heads",
    "trainable_layer",
    "vocabulary_of",
]
