"""What proposes the next trial: Optuna's samplers by name, and one that knows the problem."""

from search.samplers.choices import Draft, DraftChoices
from search.samplers.greybox import GreyBoxSampler
from search.samplers.named import make_sampler
from search.samplers.no_repeats import NoRepeats
from search.samplers.speedup import DraftCosts, SpeedupFormula

__all__ = [
    "Draft",
    "DraftChoices",
    "DraftCosts",
    "GreyBoxSampler",
    "NoRepeats",
    "SpeedupFormula",
    "make_sampler",
]
