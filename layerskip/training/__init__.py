"""Training draft layers, bridges and draft heads on the target model's own texts."""

from layerskip.training.data import (
    DataSettings,
    GivenPrompts,
    PromptSource,
    SelfWrittenPrompts,
    TrainingTexts,
    TrainingTextWriter,
    vocabulary_of,
)
from layerskip.training.evaluation import LOSSES, RANKS, Agreement, Loss
from layerskip.training.train import EvalResult, Trained, TrainingSettings, train
from layerskip.training.trainable_draft import TrainableDraft

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
    "TrainableDraft",
    "Trained",
    "TrainingSettings",
    "TrainingTextWriter",
    "TrainingTexts",
    "train",
    "vocabulary_of",
]
