"""Samplers by name."""

import pickle

import optuna
import pytest

from layerskip.errors import InvalidInputError
from search.samplers import SAMPLERS, DraftChoices, make_sampler
from tests.search.samplers.problems import acceptance_by, bits, even_costs, run

CHOICES = DraftChoices(bits(4), bridges=True, vocabularies=(0, 8))


def made(name, seed=0):
    return make_sampler(name, choices=CHOICES, costs=even_costs(4), seed=seed)


def proposals(sampler):
    study = optuna.create_study(direction="maximize", sampler=sampler)
    return run(study, CHOICES, 8, acceptance_by((0.1, 0.2, 0.3, 0.4)))


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_proposes_drafts_repeatably_also_after_being_pickled(name):
    sampler = made(name)
    copy = pickle.loads(pickle.dumps(sampler))
    drafts = proposals(sampler)
    assert None not in drafts
    assert drafts == proposals(copy) == proposals(made(name)) != proposals(made(name, seed=1))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_seed_is_not_needed(name):
    assert len(proposals(made(name, seed=None))) == 8


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(InvalidInputError) as caught:
        made("annealing")
    assert str(caught.value) == "sampler: expected one of greybox, tpe, gp, nsga2, random, got 'annealing'"
