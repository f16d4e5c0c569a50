"""No candidate is tried twice, whatever sampler proposes."""

from dataclasses import replace

import optuna
import pytest

from layerskip import SkipSet
from layerskip.drafting.config import DraftConfig
from search.samplers import NoRepeats, make_sampler
from search.settings import SAMPLERS
from tests.search.samplers.problems import ALL_SPACES, acceptance_by, even_costs, space_of

DAMAGES = (0.01, 0.9, 0.02, 1.5, 0.03, 0.4)


def searched(sampler, space, trials):
    """Parameters of trials that choose as a search does."""
    study = optuna.create_study(direction="maximize", sampler=NoRepeats(sampler, space, seed=0))
    acceptance = acceptance_by(DAMAGES, trained=0.2)

    def objective(trial):
        distributions = space.distributions.items()
        config = space.config_or_none({name: trial.suggest_categorical(name, d.choices) for name, d in distributions})
        rate = acceptance(config) if config else 0.0
        trial.set_user_attr("acceptance", rate)
        return rate + 0.1 * sum(trial.params[bit] for bit in space.bit_names)

    study.optimize(objective, n_trials=trials)
    return [trial.params for trial in study.trials]


def named(name, space):
    return make_sampler(name, space, even_costs(space), seed=0)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("space", ALL_SPACES[-2:])
def test_what_a_draft_layer_replaces_is_skipped_whatever_sampler_proposes(name, space):
    tried = searched(named(name, space), space, 25)
    assert {parameters["draft_layer"] for parameters in tried} >= {0, 1}
    for parameters in tried:
        if config := space.config_or_none(parameters):
            assert space.parameters(config) == parameters


@pytest.mark.parametrize("name", SAMPLERS)
def test_below_a_low_exit_everything_is_tried_before_anything_is_tried_again(name):
    space = space_of(3, exits=(1,))
    configs = [space.config_or_none(parameters) for parameters in searched(named(name, space), space, 45)]
    # Of the first five TPE draws each parameter by itself, and may repeat one.
    assert len(set(configs)) >= 41
    only = DraftConfig(SkipSet(3), draft_layer=space.draft_layers[0])
    assert configs.count(only) <= 2


def test_any_sampler_of_optuna_can_propose():
    space = replace(ALL_SPACES[-1], vocabulary_sizes=(0,))
    sampler = optuna.samplers.NSGAIISampler(population_size=4, seed=0)
    assert len(searched(sampler, space, 12)) == 12
