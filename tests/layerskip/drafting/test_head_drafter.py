"""Drafting with heads: whatever they say, the text is the target model's."""

from datetime import UTC, datetime

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, StoppingCriteriaList

from layerskip import (
    ConfidenceThreshold,
    DraftProfile,
    FixedLength,
    LayerSkipModel,
    Sampling,
    generate,
    speculate,
)
from layerskip.drafting.head_drafter import HeadDrafter
from layerskip.drafting.heads import HEAD_KINDS, untrained_heads
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import GraphEngine
from layerskip.errors import InvalidInputError
from layerskip.fingerprint import identify
from layerskip.logits_processing import GenerationHistory, ProcessorSampling
from layerskip.profile import Provenance
from layerskip.token_tree import TokenTree
from tests.capture import like_a_graph
from tests.layerskip.test_generation_host_reads import HostReads
from tests.layerskip.test_sampling_exactness import (
    DOUBT,
    PLAIN,
    WARPED,
    distribution_of_texts,
    p_value,
    samples,
)
from tests.layerskip.test_sampling_exactness import model as tiny_vocabulary  # noqa: F401
from tests.models import (
    VOCABULARY,
    head_config,
    near_tie_or_same,
    random_heads,
    tiny_llama,
    transformers_greedy,
)
from tests.strategies import bushes, draft_exits, tokens

kinds = pytest.mark.parametrize("kind", HEAD_KINDS)
some_kind = st.sampled_from(HEAD_KINDS)
some_ids = st.sampled_from([None, torch.arange(3, 40)])
scales = st.sampled_from([0.0, 0.1, 1.0])


@given(tokens(16), some_kind, scales, draft_exits(), bushes(), st.sampled_from([0.0, 0.3]), some_ids)
@settings(max_examples=6)
def test_greedy_output_is_that_of_transformers(each_family, prompt, kind, scale, draft_exit, widths, gate, ids):
    heads = random_heads(each_family, kind, 4, scale=scale)
    drafter = HeadDrafter(
        each_family,
        head_config(each_family, draft_exit, target_confidence_threshold=gate, tree=widths),
        DraftWeights(token_ids=ids, heads=heads),
    )
    ours = generate(each_family, prompt, drafter=drafter, max_new_tokens=16, eos_token_ids=[])
    expected = transformers_greedy(each_family.hf_model, prompt, 16, set())
    near_tie_or_same(each_family.hf_model, prompt, ours.tokens, expected)


@given(tokens(16), some_kind, bushes(), st.integers(1, 20))
@settings(max_examples=15)
def test_captured_greedy_output_is_that_of_transformers(tiny, prompt, kind, widths, length):
    engine = GraphEngine(tiny, like_a_graph, smallest_bucket=8)
    drafter = HeadDrafter(
        tiny, head_config(tiny, FixedLength(3), tree=widths), DraftWeights(heads=random_heads(tiny, kind))
    )
    ours = generate(tiny, prompt, engine=engine, drafter=drafter, max_new_tokens=length, eos_token_ids=[])
    near_tie_or_same(tiny.hf_model, prompt, ours.tokens, transformers_greedy(tiny.hf_model, prompt, length, set()))


class Watched(HeadDrafter):
    """Keeps each draft with the text that it was proposed behind."""

    def start(self, engine, prompt, states):
        super().start(engine, prompt, states)
        self.text, self.said = prompt.tolist(), []

    def propose(self, newest, cache, limit, sampler):
        draft = super().propose(newest, cache, limit, sampler)
        self.said.append(([*self.text, *newest.tolist()], draft))
        return draft

    def observe(self, outcome):
        super().observe(outcome)
        self.text += outcome.seen.tolist()


@kinds
@pytest.mark.parametrize("captured", [False, True])
def test_drafts_are_what_the_heads_say_behind_the_state_that_chose_the_newest_token(tiny, kind, captured):
    """Whichever branch the text took, and on every engine: against a pass over the text so far."""
    model = LayerSkipModel(tiny.hf_model)
    engine = GraphEngine(model, like_a_graph, smallest_bucket=8) if captured else None
    heads, widths = random_heads(model, kind, 3, scale=0.05), (5, (4, 0, 2), (2, 1, 0, 0, 3))
    drafter = Watched(model, head_config(model, FixedLength(3), tree=widths), DraftWeights(heads=heads))
    stats = generate(model, [1, 5, 7], engine=engine, drafter=drafter, max_new_tokens=30, eos_token_ids=[]).stats
    assert stats.accepted
    with torch.inference_mode():
        for text, draft in drafter.said:
            before = torch.tensor(text[:-1])
            state = model.forward(before, model.new_cache(len(before)))[0, -1:]
            ways = [[text[-1]]]  # to each row
            for parent, token in zip(draft.tree.parents, draft.tokens.tolist(), strict=True):
                ways.append([*ways[parent], token])
            for row, following in draft.tree.children.items():
                known = model.embed(torch.tensor(ways[row]))
                scores = model.logits(heads.at(len(ways[row]) - 1, state, known)[None])[0]
                proposed = draft.tokens[[after - 1 for after in following]]
                best = scores.topk(len(following)).values
                torch.testing.assert_close(scores[proposed], best, atol=1e-3, rtol=1e-3)
        whole = [draft.tree for _, draft in drafter.said if draft.tree.depth == 3]
        assert set(whole) == {TokenTree.grown([[5], [4, 0, 2, 0, 0], [2, 1, 0, 0, 3, 0]])}


@kinds
def test_rules_that_look_at_the_text_see_the_way_to_each_place(llama, kind):
    prompt, rule = torch.tensor([[1, 5, 7]]), RepetitionPenaltyLogitsProcessor(8.0)
    sampling = ProcessorSampling(
        GenerationHistory(prompt, StoppingCriteriaList()), LogitsProcessorList([rule]), False, VOCABULARY
    )
    heads = random_heads(llama, kind, 3, scale=0.05)
    drafter = Watched(llama, head_config(llama, FixedLength(3), tree=(2, (1, 2), (1, 1, 1))), DraftWeights(heads=heads))
    generate(llama, prompt, drafter=drafter, sampling=sampling, max_new_tokens=20, eos_token_ids=[])
    with torch.inference_mode():
        for text, draft in drafter.said:
            before = torch.tensor(text[:-1])
            state = llama.forward(before, llama.new_cache(len(before)))[0, -1:]
            ways = [[text[-1]]]
            for parent, token in zip(draft.tree.parents, draft.tokens.tolist(), strict=True):
                ways.append([*ways[parent], token])
            for row, following in draft.tree.children.items():
                known = llama.embed(torch.tensor(ways[row]))
                scores = llama.logits(heads.at(len(ways[row]) - 1, state, known)[None])
                scores = rule(torch.tensor([[*text[:-1], *ways[row]]]), scores)[0]
                proposed = draft.tokens[[after - 1 for after in following]]
                torch.testing.assert_close(scores[proposed], scores.topk(len(following)).values, atol=1e-3, rtol=1e-3)


def test_a_draft_is_no_longer_than_there_are_heads(llama):
    drafter = Watched(llama, head_config(llama, FixedLength(5)), DraftWeights(heads=random_heads(llama, "medusa", 2)))
    generate(llama, [1, 2], drafter=drafter, max_new_tokens=12, eos_token_ids=[])
    assert {len(draft) for _, draft in drafter.said} <= {0, 1, 2}
    assert max(len(draft) for _, draft in drafter.said) == 2


@kinds
def test_a_draft_that_proposes_the_whole_vocabulary_is_right_in_every_round(llama, kind):
    drafter = HeadDrafter(
        llama, head_config(llama, FixedLength(1), tree=(VOCABULARY,)), DraftWeights(heads=random_heads(llama, kind))
    )
    stats = generate(llama, [3, 2], drafter=drafter, max_new_tokens=25, eos_token_ids=[]).stats
    assert (stats.rounds, stats.drafted, stats.accepted) == (12, 12, 12)


@kinds
def test_a_confidence_exit_stops_where_a_head_is_unsure(llama, kind):
    heads, lengths = random_heads(llama, kind, 4, scale=0.02), []
    for threshold in (0.0, 0.3, 1.0):
        drafter = Watched(llama, head_config(llama, ConfidenceThreshold(threshold, 4)), DraftWeights(heads=heads))
        generate(llama, [1, 2], drafter=drafter, max_new_tokens=30, eos_token_ids=[])
        lengths.append(sum(len(draft) for _, draft in drafter.said) / len(drafter.said))
    assert lengths[0] > lengths[1] > lengths[2]


@kinds
@pytest.mark.parametrize(
    ("widths", "settings_"),
    [((), PLAIN), ((3, 1, 2), PLAIN), ((3, (2, 1), (1, 0, 2)), PLAIN), ((3, (2, 1), (1, 0, 2)), WARPED)],
    ids=str,
)
def test_samples_follow_the_full_model(tiny_vocabulary, kind, widths, settings_):  # noqa: F811
    drafter = HeadDrafter(
        tiny_vocabulary,
        head_config(tiny_vocabulary, FixedLength(3), tree=widths),
        DraftWeights(heads=random_heads(tiny_vocabulary, kind, 3, scale=0.3)),
    )
    observed = samples(tiny_vocabulary, drafter, settings_)
    assert p_value(observed, distribution_of_texts(tiny_vocabulary, settings_)) > DOUBT


@kinds
def test_samples_with_a_draft_vocabulary_and_a_confidence_exit_follow_the_full_model(tiny_vocabulary, kind):  # noqa: F811
    drafter = HeadDrafter(
        tiny_vocabulary,
        head_config(tiny_vocabulary, ConfidenceThreshold(0.5, 3), tree=(2,)),
        DraftWeights(token_ids=torch.tensor([0, 2, 3]), heads=random_heads(tiny_vocabulary, kind, 3, scale=0.3)),
    )
    assert (
        p_value(samples(tiny_vocabulary, drafter, PLAIN, 1000), distribution_of_texts(tiny_vocabulary, PLAIN)) > DOUBT
    )


@kinds
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, top_k=20, top_p=0.9, seed=1)], ids=["greedy", "random"])
def test_a_round_reads_from_the_device_once(llama, kind, sampling):
    drafter = HeadDrafter(
        llama,
        head_config(llama, FixedLength(3)),
        DraftWeights(token_ids=torch.arange(2, 60), heads=random_heads(llama, kind)),
    )
    counts = []
    for length in (24, 1, 24):  # at first what depends on a tree's shape alone comes to the device, to stay
        with HostReads() as reads:
            made = generate(
                llama, [1, 2, 3], drafter=drafter, sampling=sampling, max_new_tokens=length, eos_token_ids=[]
            )
        counts.append(reads.count)
    assert counts[2] - counts[1] == made.stats.rounds > 2


@kinds
def test_a_model_in_bfloat16_drafts_with_heads(kind):
    model = LayerSkipModel(tiny_llama().to(torch.bfloat16))
    drafter = HeadDrafter(model, head_config(model, FixedLength(3)), DraftWeights(heads=random_heads(model, kind)))
    stats = generate(model, [1, 2, 3], drafter=drafter, max_new_tokens=12, eos_token_ids=[]).stats
    assert stats.drafted


def test_generate_of_transformers_decodes_with_heads():
    model = tiny_llama()
    wrapped = LayerSkipModel(model)
    provenance = Provenance(created=datetime(2026, 1, 2, tzinfo=UTC), tool="a test")
    profile = DraftProfile.of(
        head_config(wrapped, FixedLength(3)),
        DraftWeights(heads=random_heads(wrapped, "hydra")),
        model=identify(wrapped, "my-model"),
        provenance=provenance,
    )
    out = model.generate(
        torch.tensor([[1, 2, 3]]), max_new_tokens=12, custom_generate=speculate(profile), pad_token_id=0,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert out.sequences[0, 3:].tolist() == transformers_greedy(model, [1, 2, 3], 12)
    assert out.stats.drafted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_confidence_threshold": 1.5}, "target_confidence_threshold: expected a number from 0 to 1, got 1.5"),
        (
            {"tree": (0,)},
            r"place 1 of the tree: expected at least 1, or a list that may hold 0 after its first number, got 0",
        ),
        ({"tree": (2, (1, 1, 1))}, "place 2 of the tree: has 3 numbers, but follows 2 tokens"),
        ({"tree": (40, (1,) * 40)}, "tree: expected at most 64 tokens besides the first of each place"),
    ],
)
def test_options_out_of_range_are_refused(llama, options, message):
    with pytest.raises(InvalidInputError, match=f"^{message}$"):
        HeadDrafter(
            llama, head_config(llama, FixedLength(2), **options), DraftWeights(heads=untrained_heads("medusa", 2, 32))
        )
