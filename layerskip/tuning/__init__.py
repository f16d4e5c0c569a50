"""Training what drafts: stand-ins for skipped sublayers, or heads; on the full model's own texts."""

from layerskip.tuning.data import DataSettings, Shards, TuningData, TuningText
from layerskip.tuning.learners import Learner, bridge_learner, heads_learner, layer_learner
from layerskip.tuning.prompting import GivenPrompts, PromptSource, SelfWrittenPrompts
from layerskip.tuning.scoring import LOSSES, RANKS, Agreement, Loss
from layerskip.tuning.training import Look, Trained, TrainingSettings, train
from layerskip.tuning.vocabulary import vocabulary_of

__all__ = [
    "LOSSES",
    "RANKS",
    "Agreement",
    "DataSettings",
    "GivenPrompts",
    "Learner",
    "Look",
    "Loss",
    "PromptSource",
    "SelfWrittenPrompts",
    "Shards",
    "Trained",
    "TrainingSettings",
    "TuningData",
    "TuningText",
    "bridge_learner",
    "heads_learner",
    "layer_learner",
    "train",
    "vocabulary_of",
]
