"""Small problems for samplers: costs that are known, and damages that are to be found."""

import math

import numpy as np
import optuna

from layerskip.costs import Costs, PassCosts, StepCosts
from layerskip.drafting.config import DraftConfig, DraftLayerRef
from search.samplers import DraftCosts
from search.space import SearchSpace


def costs_of_widths(verification):
    """Of passes over 1, 2, ... tokens; draft steps cost nothing."""
    by_width = dict(enumerate(verification, start=1))
    return Costs(0.0, StepCosts(0.0, 0.0, 0.0, 0.0, {0: 0.0}), PassCosts(by_width, dict.fromkeys(by_width, 0.0)), 0.0)


def no_bridges(masks):
    return np.zeros(len(masks), dtype=int)


class LinearCosts(DraftCosts):
    """A draft step costs its head and what it keeps; a module's class, so that it can be pickled."""

    def __init__(self, sublayers, *, head=0.2, bridge=0.02, width=0.01, max_draft_length=8):
        widths = (1 + width * number for number in range(max_draft_length + 1))
        super().__init__(costs_of_widths(widths), no_bridges, max_draft_length)
        vars(self).update(sublayers=tuple(sublayers), head=head, bridge=bridge)

    def draft_steps(self, options, masks):
        kept = ~masks @ np.array(self.sublayers)
        trained = max(self.sublayers) * bool(options.draft_layer)
        head = self.head / 2 if options.vocabulary_size else self.head
        return head + kept + trained + self.bridge * (options.bridges & masks.any(axis=1))


def even_costs(space):
    sublayers = [0.4 / space.num_layers] * (2 * space.num_layers)
    return LinearCosts(sublayers, max_draft_length=space.max_draft_length)


def space_of(num_layers, *, exits=(), **options):
    """A small space, with draft layers above exits at these sublayers."""
    layers = (DraftLayerRef(start, 2 * num_layers, "layer", 0, f"{start}") for start in exits)
    return SearchSpace(num_layers, draft_layers=tuple(layers), **options)


def run(study, space, trials, acceptance, *, fails=(), prunes=()):
    """Trials that note their acceptance rate; their value is of no interest to a sampler that knows it."""

    def objective(trial):
        distributions = space.distributions.items()
        parameters = {name: trial.suggest_categorical(name, d.choices) for name, d in distributions}
        config = space.config_or_none(parameters)
        trial.set_user_attr("acceptance", acceptance(config) if config else 0.0)
        if trial.number in fails:
            raise RuntimeError
        if trial.number in prunes:
            raise optuna.TrialPruned
        return 1.0

    study.optimize(objective, n_trials=trials, catch=RuntimeError)
    return [space.config_or_none(trial.params) for trial in study.trials]


def acceptance_by(damages, *, repaired=0.5, trained=3.0):
    """An additive problem: α of a draft from what skipping each sublayer, and having a draft layer, does."""

    def acceptance(config: DraftConfig):
        total = sum(damage for damage, skip in zip(damages, config.skipped_below.mask, strict=False) if skip)
        extra = 0.02 * bool(config.vocabulary_size) + trained * bool(config.draft_layer)
        return math.exp(-total * (repaired if config.bridges else 1) - extra)

    return acceptance


ALL_SPACES = [
    space_of(3),
    space_of(3, bridges=True),
    space_of(3, bridges=True, vocabulary_sizes=(0, 8, 16)),
    space_of(3, vocabulary_sizes=(8, 16)),
    space_of(3, exits=(3,)),
    space_of(3, bridges=True, vocabulary_sizes=(0, 8), exits=(2, 5)),
]
