"""Drafts that branch: the same text in fewer rounds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor, StoppingCriteriaList

from layerskip import DraftConfig, FixedLength, Sampling, SkipSet, generate
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import DraftStep, GraphEngine
from layerskip.errors import InvalidInputError
from layerskip.logits_processing import GenerationHistory, ProcessorSampling
from layerskip.sampling import Draft, Draw, GreedySampler, speculative_choice
from layerskip.token_tree import MOST_LEAVES, TokenTree
from tests.capture import like_a_graph
from tests.layerskip.test_sampling_exactness import (
    DOUBT,
    PLAIN,
    SKIPPED,
    WARPED,
    distribution_of_texts,
    p_value,
    samples,
)
from tests.layerskip.test_sampling_exactness import model as tiny_vocabulary  # noqa: F401
from tests.models import LAYERS, VOCABULARY, near_tie_or_same, random_layers, transformers_greedy
from tests.strategies import branches, draft_exits, skip_sets, tokens

CPU = torch.device("cpu")
LIGHT = SkipSet(LAYERS, (1,), (2,))


@given(tokens(16), skip_sets(), draft_exits(), branches(), st.integers(1, 24))
@settings(max_examples=40)
def test_greedy_output_is_that_of_transformers(tiny, prompt, skip_set, draft_exit, widths, length):
    drafter = LayerSkipDrafter(tiny, DraftConfig(skip_set, stopping=draft_exit, tree=widths))
    ours = generate(tiny, prompt, drafter=drafter, max_new_tokens=length, eos_token_ids=[])
    near_tie_or_same(tiny.hf_model, prompt, ours.tokens, transformers_greedy(tiny.hf_model, prompt, length, set()))


@given(tokens(16), skip_sets(), branches(), st.integers(1, 24))
@settings(max_examples=20)
def test_captured_greedy_output_is_that_of_transformers(tiny, prompt, skip_set, widths, length):
    engine = GraphEngine(tiny, like_a_graph, smallest_bucket=8)
    drafter = LayerSkipDrafter(tiny, DraftConfig(skip_set, stopping=FixedLength(3), tree=widths))
    ours = generate(tiny, prompt, engine=engine, drafter=drafter, max_new_tokens=length, eos_token_ids=[])
    near_tie_or_same(tiny.hf_model, prompt, ours.tokens, transformers_greedy(tiny.hf_model, prompt, length, set()))


@pytest.mark.parametrize("token_ids", [None, torch.arange(3, 50)], ids=["whole vocabulary", "draft vocabulary"])
def test_branches_take_fewer_rounds(llama, token_ids):
    rounds = []
    for widths in ((), (VOCABULARY,)):
        drafter = LayerSkipDrafter(
            llama, DraftConfig(LIGHT, stopping=FixedLength(2), tree=widths), DraftWeights(token_ids=token_ids)
        )
        runs = [generate(llama, [first, 2], drafter=drafter, max_new_tokens=24, eos_token_ids=[]) for first in range(4)]
        rounds.append(sum(run.stats.rounds for run in runs))
    assert rounds[1] < rounds[0]


def test_a_draft_that_proposes_the_whole_vocabulary_is_right_in_every_round(llama):
    drafter = LayerSkipDrafter(llama, DraftConfig(LIGHT, stopping=FixedLength(1), tree=(VOCABULARY,)))
    stats = generate(llama, [3, 2], drafter=drafter, max_new_tokens=25, eos_token_ids=[]).stats
    assert (stats.rounds, stats.drafted, stats.accepted) == (12, 12, 12)


@pytest.mark.parametrize("widths", [(2, 3), (4, 4, 4)])
def test_a_layer_of_the_drafts_own_sees_the_text_whichever_branch_it_took(tiny, widths):
    """Its proposals are those of a draft that has seen the text from the beginning."""
    assets = DraftWeights(layers=random_layers(tiny, {3: 2 * LAYERS}))
    skip_set = SkipSet.from_mask([index >= 3 for index in range(2 * LAYERS)])
    drafter = LayerSkipDrafter(tiny, DraftConfig(skip_set, stopping=FixedLength(3), tree=widths), assets)
    stack, said = drafter._stack, []
    propose = drafter.propose

    def watched(newest, cache, limit, sampler):
        said.append((newest.tolist(), propose(newest, cache, limit, sampler)))
        return said[-1][1]

    drafter.propose = watched
    new = generate(tiny, [1, 5, 7], drafter=drafter, max_new_tokens=24, eos_token_ids=[])
    assert new.stats.accepted
    text = [1, 5, 7, *new.tokens]
    at = 3
    with torch.inference_mode():
        for (newest,), draft in said:
            assert text[at] == newest
            ids = torch.tensor(text[: at + 1])
            x = stack.run(tiny.embed(ids), tiny.pass_context(len(ids), tiny.new_cache(len(ids))))
            if len(draft):
                likeliest = tiny.logits(x[:, -1:], stack)[0].topk(widths[0]).indices.tolist()
                siblings = [draft.tokens[row - 1].item() for row in draft.tree.children[0]]
                assert siblings == likeliest
            after = text[at + 1 :]
            rows = draft.tree.follow(draft.tokens.tolist(), chosen_behind(draft, after))
            at += len(rows)


def chosen_behind(draft, after):
    """For each row of a draft's tree the text's token that follows, if the text came there."""
    padded = [*after, *[-1] * (draft.tree.depth + 1)]
    return [padded[depth] for depth in draft.tree.depths]


@pytest.mark.parametrize(
    ("widths", "settings_"), [((2, 2), PLAIN), ((3, 1, 2), PLAIN), ((4, 4), PLAIN), ((4, 4), WARPED)], ids=str
)
def test_samples_follow_the_full_model(tiny_vocabulary, widths, settings_):  # noqa: F811
    drafter = LayerSkipDrafter(tiny_vocabulary, DraftConfig(SKIPPED, stopping=FixedLength(3), tree=widths))
    observed = samples(tiny_vocabulary, drafter, settings_)
    assert p_value(observed, distribution_of_texts(tiny_vocabulary, settings_)) > DOUBT


BUSHY = TokenTree((0, 0, 0, 1, 1, 2, 4, 4))


@pytest.mark.parametrize("sharpness", [0.5, 3.0])
def test_a_round_over_a_tree_follows_the_target_whatever_the_draft(sharpness):
    """Siblings below one depth share their draw; no distribution depends on a token, so places are independent."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(BUSHY.depth + 1, 5, generator=generator)
    draft = sharpness * torch.randn(BUSHY.depth, 5, generator=generator)
    sampler = Sampling(1.0, seed=0).sampler(CPU)
    counts = [[0] * 5 for _ in range(BUSHY.depth + 1)]
    logits = target[list(BUSHY.depths)]
    for _ in range(6000):
        draws = [sampler.draft(DraftStep.of(row, None, None), None, 3) for row in draft]
        verdict = sampler.verify(draft_of(BUSHY, draws), logits)
        for place, token in enumerate(verdict.tokens):
            counts[place][token] += 1
    for place, counted in enumerate(counts):
        assert sum(counted) > 300
        expected = dict(enumerate(target[place].double().softmax(-1).tolist()))
        assert p_value(dict(enumerate(counted)), expected) > DOUBT


def draft_of(tree, draws):
    """A draft of some shape from one draw for each depth."""
    tokens, distributions = [None] * len(tree.parents), []
    for parent, rows in tree.children.items():
        draw = draws[tree.depths[parent]]
        distributions.append(draw.distribution)
        for number, row in enumerate(rows):
            tokens[row - 1] = draw.tokens[number]
    return Draft(torch.stack(tokens), tree, tuple(distributions))


def test_the_choice_behind_one_row_follows_the_target():
    generator = torch.Generator().manual_seed(1)
    target, draft = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.7, 0.2, 0.1, 0.0])
    sampler, counts = Sampling(1.0, seed=2).sampler(CPU), dict.fromkeys(range(4), 0)
    for _ in range(6000):
        drawn = sampler.draft(DraftStep.of(draft.log(), None, None), None, 3).tokens
        counts[int(speculative_choice(drawn, draft, target, generator))] += 1
    assert p_value(counts, dict(enumerate(target.tolist()))) > DOUBT


def test_tokens_that_the_draft_could_not_draw_never_stand_by_having_been_proposed():
    """Fewer tokens are likely than are asked for: the others fill the places, and must not be taken for drawn."""
    target, draft = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    generator = torch.Generator().manual_seed(1)
    sampler, counts = Sampling(1.0, seed=2).sampler(CPU), dict.fromkeys(range(4), 0)
    for _ in range(6000):
        drawn = sampler.draft(DraftStep.of(draft.log(), None, None), None, 4).tokens
        counts[int(speculative_choice(drawn, draft, target, generator))] += 1
    assert p_value(counts, dict(enumerate(target.tolist()))) > DOUBT


@given(tokens(10), skip_sets(), branches())
@settings(max_examples=15)
def test_processed_text_is_that_of_plain_decoding(tiny, prompt, skip_set, widths):
    def text(drafter):
        history = GenerationHistory(torch.tensor([prompt]), StoppingCriteriaList())
        processors = LogitsProcessorList([NoRepeatNGramLogitsProcessor(2)])
        sampling = ProcessorSampling(history, processors, do_sample=False, vocab_size=VOCABULARY)
        return generate(tiny, prompt, drafter=drafter, sampling=sampling, max_new_tokens=12, eos_token_ids=[]).tokens

    assert text(LayerSkipDrafter(tiny, DraftConfig(skip_set, stopping=FixedLength(3), tree=widths))) == text(None)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((2, 0), "place 2 of the tree: expected at least 1, or a list that may hold 0 after its first number, got 0"),
        ((MOST_LEAVES, 3), f"tree: expected at most {MOST_LEAVES} tokens besides the first of each place"),
        (
            (2, (1, 1)),
            "tree: only draft heads propose tokens after several tokens of a place; give one number for each place",
        ),
    ],
)
def test_branches_out_of_range_are_refused(llama, widths, message):
    with pytest.raises(InvalidInputError) as error:
        LayerSkipDrafter(llama, DraftConfig(LIGHT, stopping=FixedLength(2), tree=widths))
    assert str(error.value) == message


def test_greedy_siblings_are_the_likeliest_tokens_best_first():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    ids = torch.tensor([10, 11, 12, 13])
    step = DraftStep.of(logits, ids, None)
    assert GreedySampler().draft(step, ids, 3).tokens.tolist() == [11, 13, 12]
    assert GreedySampler().draft(step, ids, 9).tokens.tolist() == [11, 13, 12, 10]
    assert GreedySampler().draft(step, ids) == Draw(step.likeliest, None)
