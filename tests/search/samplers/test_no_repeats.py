"""No candidate is tried twice, whoever proposes."""

import optuna
import pytest

from search.samplers import Draft, DraftChoices, NoRepeats, make_sampler
from search.settings import SAMPLERS
from tests.search.samplers.problems import ALL_KINDS, acceptance_by, bits, even_costs

DAMAGES = (0.01, 0.9, 0.02, 1.5, 0.03, 0.4)


def searched(name, choices, trials):
    """Parameters of trials that choose as a search does: the stand-in first."""
    sampler = make_sampler(name, choices=choices, costs=even_costs(len(choices.bits)), seed=0)
    study = optuna.create_study(direction="maximize", sampler=NoRepeats(sampler, choices, seed=0))
    acceptance = acceptance_by(DAMAGES, exits=choices.exits, trained=0.2)

    def objective(trial):
        names = sorted(choices.distributions, key=lambda one: one != "stand_in")
        parameters = {one: trial.suggest_categorical(one, choices.distributions[one].choices) for one in names}
        rate = acceptance(choices.draft(parameters))
        trial.set_user_attr("acceptance", rate)
        return rate + 0.1 * sum(parameters[bit] for bit in choices.bits)

    study.optimize(objective, n_trials=trials)
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("choices", ALL_KINDS[-2:])
def test_what_a_stand_in_stands_for_is_left_out_whoever_proposes(name, choices):
    tried = searched(name, choices, 25)
    assert {parameters["stand_in"] for parameters in tried} >= {0, 1}
    for parameters in tried:
        assert choices.parameters(choices.draft(parameters)) == parameters


@pytest.mark.parametrize("name", ["tpe", "greybox"])
def test_below_a_low_exit_everything_is_tried_before_anything_is_tried_again(name):
    choices = DraftChoices(bits(6), exits=(1,))
    drafts = [choices.draft(parameters) for parameters in searched(name, choices, 45)]
    # Of the first five the black boxes draw each parameter by itself, and may repeat one.
    assert len(set(drafts)) >= 41
    only = choices.effective(Draft((False,) * 6, stand_in=1))
    assert drafts.count(only) <= 2
