"""Samplers by name."""

import pickle

import optuna
import pytest

from layerskip.errors import InvalidInputError
from search.samplers import make_sampler
from search.settings import SAMPLERS
from tests.search.samplers.problems import acceptance_by, even_costs, run, space_of

SPACE = space_of(2, bridges=True, vocabulary_sizes=(0, 8))


def made(name, seed=0):
    return make_sampler(name, SPACE, even_costs(SPACE), seed=seed)


def proposals(sampler):
    study = optuna.create_study(direction="maximize", sampler=sampler)
    run(study, SPACE, 8, acceptance_by((0.1, 0.2, 0.3, 0.4)))
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_proposes_candidates_repeatably_also_after_being_pickled(name):
    sampler = made(name)
    copy = pickle.loads(pickle.dumps(sampler))
    proposed = proposals(sampler)
    assert all(parameters.keys() == SPACE.distributions.keys() for parameters in proposed)
    assert proposed == proposals(copy) == proposals(made(name)) != proposals(made(name, seed=1))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_seed_is_not_needed(name):
    assert len(proposals(made(name, seed=None))) == 8


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(InvalidInputError) as caught:
        made("annealing")
    assert str(caught.value) == "sampler: expected one of tpe, greybox, got 'annealing'"
