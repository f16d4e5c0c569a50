"""Searching with bridges, draft vocabularies and gates."""

from dataclasses import replace

import pytest
import torch

import search.space as space_module
from layerskip import DraftProfile, FixedLength, SkipSet, generate
from layerskip.drafts.bridges import BridgeFitter
from search.reference import Reference, drafter_of
from search.space import Candidate, SearchSpace
from studies.study import load_study
from tests.models import LAYERS, VOCABULARY, near_tie_or_same, transformers_greedy
from tests.search.searches import CtrlC, random_prompts, small_search

MIDDLE = SkipSet(LAYERS, attention=(1, 2), mlp=(1, 2))
CANDIDATE = Candidate(MIDDLE, FixedLength(3))


@pytest.fixture
def space(monkeypatch):
    """Everything, in the sizes of a tiny model."""
    monkeypatch.setattr(space_module, "_VOCABULARIES", (VOCABULARY // 2, 10**6))
    monkeypatch.setattr(BridgeFitter, "_worth_it", lambda self, start, stop: True)
    return lambda model: SearchSpace.of(model)


@pytest.fixture
def rich_search(space, storage):
    def make(model, **named):
        return small_search(model, storage, space=space(model), **named)

    return make


def test_a_space_has_what_it_is_asked_for(llama, space):
    everything = space(llama)
    assert (everything.bridges, everything.vocabularies) == (True, (0, VOCABULARY // 2))
    assert everything.gates[0] == 0
    assert everything.needs_reference
    nothing = SearchSpace.of(llama, bridges=False, vocabulary=False, gate=False)
    assert nothing == SearchSpace(LAYERS)
    assert not nothing.needs_reference
    assert not SearchSpace.of(llama, bridges=False, vocabulary=False).needs_reference


def test_every_choice_survives_as_a_trial_s_parameters(llama, space):
    candidate = replace(CANDIDATE, bridged=True, vocabulary=VOCABULARY // 2, gate=0.3)
    everything = space(llama)
    assert everything.candidate(everything.parameters(candidate)) == candidate
    assert candidate.draft == f"3 tokens, bridged, vocabulary {VOCABULARY // 2}, gate 0.3"


def test_a_reference_makes_what_a_candidate_asks_for_and_nothing_else(llama, space):
    reference = Reference(llama, random_prompts().search, max_new_tokens=8)
    assert not reference.assets(CANDIDATE)
    bridged = reference.assets(replace(CANDIDATE, bridged=True))
    assert (set(bridged.bridges), bridged.token_ids) == ({2}, None)
    small = reference.assets(replace(CANDIDATE, vocabulary=7))
    assert (small.bridges, len(small.token_ids)) == ({}, 7)


def test_drafts_learn_from_prompts_that_no_trial_decodes(llama, storage, space, monkeypatch):
    seen = []
    original = Reference.__init__

    def watched(self, model, prompts, **named):
        seen.extend(prompts)
        original(self, model, prompts, **named)

    monkeypatch.setattr(Reference, "__init__", watched)
    prompts = random_prompts(search=6)
    small_search(llama, storage, prompts=prompts, space=space(llama)).run()
    assert seen == list(prompts.search[3:])
    seen.clear()
    small_search(llama, storage, prompts=random_prompts(search=3), space=space(llama), study_name="few").run()
    assert len(seen) == 3


def test_a_search_saves_bridges_and_vocabulary_and_the_profile_decodes_with_them(llama, rich_search, tmp_path):
    result = rich_search(llama, trials=4).run()
    path = tmp_path / "profile.json"
    result.profile.save(path)
    loaded = DraftProfile.load(path)
    assert loaded == result.profile
    generation = generate(llama, [1, 2, 3], drafter=loaded.drafter(llama), max_new_tokens=12, eos_token_ids=[])
    expected = transformers_greedy(llama.hf_model, [1, 2, 3], 12, set())
    near_tie_or_same(llama.hf_model, [1, 2, 3], generation.tokens, expected)


def test_the_first_trial_is_bridged_and_says_so(llama, rich_search, storage):
    name = rich_search(llama, trials=1).run().study
    [trial] = [t for t in load_study(storage, name).trials if t.value is not None]
    assert trial.params["bridged"] is True
    assert "bridged" in trial.user_attrs["draft_exit"]


def test_a_rich_study_can_be_gone_on_with_and_is_not_a_plain_one(llama, rich_search, storage):
    first = rich_search(llama, trials=1).run()
    second = rich_search(llama, trials=2).run()
    assert (second.study, second.trials) == (first.study, 2)
    assert small_search(llama, storage, trials=1).run().study != first.study


def test_ctrl_c_during_the_reference_run_leaves_no_profile(llama, rich_search):
    rich_search(llama, trials=1).run()
    result = rich_search(llama, trials=2, observer=CtrlC("reference_begins")).run()
    assert (result.interrupted, result.trials, result.profile) == (True, 1, None)


def test_a_candidate_s_drafter_drafts_with_all_of_it(llama, space):
    candidate = replace(CANDIDATE, bridged=True, vocabulary=VOCABULARY // 2, gate=0.5)
    reference = Reference(llama, random_prompts().search, max_new_tokens=8)
    drafter = drafter_of(llama, candidate, reference.assets(candidate))
    assert [index for index, _ in drafter._stack.steps] == [0, 1, 2, 6, 7]
    assert len(drafter._stack.token_ids) == VOCABULARY // 2
    drafter.observe(0, 0, torch.zeros(VOCABULARY))
    assert drafter._unsure
    drafter.start()
    assert not drafter._unsure
