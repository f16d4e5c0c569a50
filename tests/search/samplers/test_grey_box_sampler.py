"""The sampler that knows the speedup's formula."""

import itertools
import math
import pickle

import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from layerskip import LayerSkipModel, SkipSet
from layerskip.drafting.config import DraftConfig
from search.samplers import GreyBoxSampler
from tests.models import VOCABULARY, tiny_llama
from tests.search.samplers.problems import ALL_SPACES, acceptance_by, even_costs, run, space_of

DAMAGES = (0.01, 0.9, 0.02, 1.5, 0.03, 0.4)
SIX = space_of(3)


def greybox(space=SIX, seed=0):
    return GreyBoxSampler(space, even_costs(space), seed=seed)


def study_with(sampler):
    return optuna.create_study(direction="maximize", sampler=sampler)


@pytest.mark.parametrize("space", ALL_SPACES)
def test_no_draft_is_proposed_twice_and_none_is_empty(space):
    drafts = run(study_with(greybox(space)), space, 40, acceptance_by(DAMAGES))
    assert len(set(drafts)) == 40
    assert None not in drafts


def test_where_everything_was_tried_it_goes_on():
    space = space_of(1, vocabulary_sizes=(0, 8))
    study = study_with(greybox(space))
    drafts = run(study, space, 8, acceptance_by((0.1, 0.2)))
    assert len(set(drafts[:6])) == 6  # three masks, two vocabularies
    assert set(drafts[6:]) <= set(drafts[:6])


def test_other_samplers_trials_are_not_repeated():
    study = study_with(optuna.samplers.RandomSampler(0))
    random = run(study, SIX, 30, acceptance_by(DAMAGES))
    study.sampler = greybox()
    both = run(study, SIX, 20, acceptance_by(DAMAGES))
    assert not set(both[30:]) & set(random)


@pytest.mark.parametrize("space", ALL_SPACES)
def test_it_finds_what_is_worth_leaving_out(space):
    drafts = run(study_with(greybox(space)), space, 30, acceptance_by(DAMAGES))
    assert (True, False, True, False, True, False) in {draft.skip_set.mask for draft in drafts}


def test_it_finds_a_draft_layer_that_pays():
    space = space_of(3, exits=(1, 3))
    drafts = run(study_with(greybox(space)), space, 12, acceptance_by(DAMAGES, trained=0.1))
    assert DraftConfig(SkipSet(3, attention=(0,)), draft_layer=space.draft_layers[1]) in drafts


def test_it_learns_from_acceptance_rates_whoever_noted_them():
    """After enough random trials, the first proposals already keep what is fatal."""
    study = study_with(optuna.samplers.RandomSampler(0))
    run(study, SIX, 40, acceptance_by(DAMAGES), prunes=range(20))
    study.sampler = greybox()
    for draft in run(study, SIX, 4, acceptance_by(DAMAGES))[40:]:
        assert not draft.skip_set.mask[1]
        assert not draft.skip_set.mask[3]


def test_a_failed_trial_is_not_repeated_and_its_rate_not_believed():
    def after(fails, rate):
        study = study_with(greybox())
        drafts = run(study, SIX, 3, lambda _: rate, fails=fails)
        assert len(set(drafts)) == 3
        return drafts[1:]

    assert after({0, 1, 2}, 0.0) == after({0, 1, 2}, 1.0)
    assert after(set(), 0.0) != after(set(), 1.0)


@pytest.mark.parametrize("rate", [0, 0.0, 1.0, 1, None, math.nan, "high"])
def test_whatever_a_trial_notes_the_next_one_is_proposed(rate):
    assert len(set(run(study_with(greybox()), SIX, 10, lambda _: rate))) == 10


@given(st.lists(st.floats(0, 1), min_size=8, max_size=8), st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_the_same_seed_and_trials_make_the_same_proposals(rates, seed):
    def proposals():
        rate = itertools.cycle(rates)
        return run(study_with(greybox(seed=seed)), SIX, 8, lambda _: next(rate))

    assert proposals() == proposals()


def test_another_seed_proposes_something_else():
    assert run(study_with(greybox()), SIX, 5, acceptance_by(DAMAGES)) != run(
        study_with(greybox(seed=1)), SIX, 5, acceptance_by(DAMAGES)
    )


def test_a_sampler_that_goes_on_or_was_pickled_proposes_what_one_in_a_single_run_does():
    whole = run(study_with(greybox()), SIX, 12, acceptance_by(DAMAGES))
    study = study_with(greybox())
    run(study, SIX, 5, acceptance_by(DAMAGES))
    study.sampler = pickle.loads(pickle.dumps(study.sampler))
    run(study, SIX, 3, acceptance_by(DAMAGES))
    study.sampler = greybox()
    assert run(study, SIX, 4, acceptance_by(DAMAGES)) == whole


def test_workers_that_share_a_seed_do_not_propose_the_same_at_once():
    study = study_with(greybox())
    asked = [study.ask(SIX.distributions) for _ in range(6)]
    assert len({SIX.config_or_none(trial.params) for trial in asked}) == 6


def test_a_parameter_that_it_does_not_know_is_drawn_at_random():
    def values(seed):
        study = study_with(greybox(seed=seed))
        trials = [study.ask(SIX.distributions) for _ in range(6)]
        return [(trial.suggest_float("x", 0, 1), trial.suggest_int("y", 1, 3)) for trial in trials]

    assert len({x for x, _ in values(0)}) == 6
    assert values(0) == values(0) != values(1)


def test_an_enqueued_draft_is_tried_as_it_is():
    study = study_with(greybox())
    start = DraftConfig(SkipSet(3, mlp=(1,)))
    study.enqueue_trial(SIX.parameters(start))
    assert run(study, SIX, 2, acceptance_by(DAMAGES))[0] == start


def test_on_a_model_of_which_parts_do_nothing_it_finds_them():
    """Agreement with the target model, position by position, is the acceptance rate."""
    hf_model = tiny_llama()
    idle = (2, 3, 5)
    with torch.no_grad():
        hf_model.model.layers[1].self_attn.o_proj.weight.zero_()
        hf_model.model.layers[1].mlp.down_proj.weight.zero_()
        hf_model.model.layers[2].mlp.down_proj.weight.zero_()
    model = LayerSkipModel(hf_model)
    text = torch.randint(VOCABULARY, (48,), generator=torch.Generator().manual_seed(0))

    def choices_of(skip_set):
        with torch.inference_mode():
            return model.logits(model.forward(text, model.new_cache(48), skip_set)).argmax(-1)

    full = choices_of(None)
    eight = space_of(4)
    study = study_with(greybox(eight))
    run(study, eight, 25, lambda draft: float((choices_of(draft.skip_set) == full).float().mean()))
    perfect = [
        trial for trial in study.get_trials(states=(TrialState.COMPLETE,)) if trial.user_attrs["acceptance"] == 1
    ]
    assert max(sum(trial.params.values()) for trial in perfect) == len(idle)
