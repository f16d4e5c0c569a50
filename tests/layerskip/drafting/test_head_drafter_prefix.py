"""Draft heads behind a layer: in pieces it sees what it would see of the whole text, and the text is the model's."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip import FixedLength, LayerSkipModel, PrefixCache, PromptLookup, Sampling, generate, stream_rounds
from layerskip.drafting.head_drafter import HeadDrafter, HeadInput, through_layer
from layerskip.drafting.heads import HEAD_KINDS
from layerskip.drafting.prompt_lookup import PromptLookupDrafter
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import EagerEngine, GraphEngine
from layerskip.kv_cache import KVCache
from layerskip.sublayers import Stack
from tests.capture import like_a_graph
from tests.layerskip.test_generation_host_reads import HostReads
from tests.layerskip.test_prefix_cache import decoded, finished
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
    LAYERS,
    head_config,
    near_tie_or_same,
    random_heads,
    random_prefix,
    tiny_llama,
    transformers_greedy,
)
from tests.strategies import branches, draft_exits, tokens

TOP = 2 * LAYERS
scales = st.sampled_from([0.02, 0.1, 1.0])


def drafter_behind(model, layer, draft_exit, *, kind="hydra", scale=0.05, cls=HeadDrafter, token_ids=None, **policy):
    assets = DraftWeights(token_ids=token_ids, layers=[layer], heads=random_heads(model, kind, 3, scale=scale))
    return cls(model, head_config(model, draft_exit, **policy), assets)


@torch.inference_mode()
def whole(model, layer, states):
    """One causal pass of the layer over a whole text's states, by the stack's own machinery."""
    cache = model.new_cache(len(states))
    return Stack(((TOP, layer),), shared=0).run(states[None], model.pass_context(len(states), cache))[0]


# The layer in pieces.


@given(
    pieces=st.lists(st.tuples(st.integers(1, 7), st.booleans()), min_size=1, max_size=8),
    like=st.integers(0, LAYERS - 1),
)
@settings(max_examples=15)
def test_in_pieces_it_gives_what_one_pass_over_the_text_gives(each_family, pieces, like):
    """However many tokens come at a time, and whenever it is asked."""
    layer = random_prefix(each_family, like=like)
    length, size = sum(count for count, _ in pieces), each_family.config.hidden_size
    states = torch.randn(length, size, generator=torch.Generator().manual_seed(length))
    expected, text = whole(each_family, layer, states), HeadInput(each_family, layer)
    position = 0
    with torch.inference_mode():
        for count, asked in [*pieces[:-1], (pieces[-1][0], True)]:
            text.add(states[position : position + count])
            position += count
            if asked:
                for _ in range(2):  # and again, with nothing new
                    torch.testing.assert_close(text.last(), expected[position - 1], atol=1e-3, rtol=1e-3)


def test_it_attends_to_the_text_before(llama):
    layer = random_prefix(llama)
    generator = torch.Generator().manual_seed(0)
    first, other, last = (torch.randn(1, 32, generator=generator) for _ in range(3))
    said = []
    with torch.inference_mode():
        for before in (first, other):
            said.append(through_layer(llama, layer, torch.cat([before, last]), KVCache(num_layers=0, capacity=2))[-1])
    assert not torch.allclose(*said, atol=1e-2)


class Watched(HeadDrafter):
    """Keeps each proposal's state with the text that it was proposed behind."""

    def start(self, engine, prompt, states):
        super().start(engine, prompt, states)
        self.text, self.read, self.seen = prompt.tolist(), [], len(prompt) - len(states)

    def propose(self, newest, cache, limit, sampler):
        draft = super().propose(newest, cache, limit, sampler)
        if len(draft):
            self.read.append((list(self.text), self._input.last()))
        return draft

    def observe(self, outcome):
        super().observe(outcome)
        self.text += outcome.seen.tolist()


def assert_read_of_the_whole_text(model, drafter):
    """Against passes of model and layer over each text from scratch."""
    assert drafter.read
    with torch.inference_mode():
        for text, state in drafter.read:
            states = model.forward(torch.tensor(text), model.new_cache(len(text)))[0]
            expected = whole(model, drafter._prefix_layer, states[drafter.seen :])[-1]
            torch.testing.assert_close(state, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("gate", [0.0, 0.25], ids=["always drafting", "not always drafting"])
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("scale", [0.02, 0.3], ids=["often right", "often wrong"])
def test_heads_read_what_the_layer_makes_of_the_whole_text(tiny, gate, captured, scale):
    """Whatever stood, was rejected, or was never drafted in the rounds before."""
    model = LayerSkipModel(tiny.hf_model)
    engine = GraphEngine(model, like_a_graph, smallest_bucket=8) if captured else None
    layer = random_prefix(model, scale=scale)
    drafter = drafter_behind(
        model, layer, FixedLength(3), scale=scale, cls=Watched, target_confidence_threshold=gate, tree=(40, 8, 4)
    )
    accepted = 0
    for first in range(3):
        stats = generate(
            model, [first, 5, 7], engine=engine, drafter=drafter, max_new_tokens=20, eos_token_ids=[]
        ).stats
        assert drafter.seen == 0  # it saw the text from its first token on
        assert stats.accepted < stats.drafted
        if gate:
            assert len(drafter.read) < stats.rounds
        assert_read_of_the_whole_text(model, drafter)
        accepted += stats.accepted
    assert accepted


def test_it_sees_what_stood_of_copies_too(llama):
    """Rounds in which another drafter proposed count as much."""
    drafter = drafter_behind(llama, random_prefix(llama), FixedLength(2), cls=Watched)
    copying = PromptLookupDrafter(PromptLookup(1, 4), drafter)
    stats = generate(llama, [1, 5, 7, 1, 5], drafter=copying, max_new_tokens=40, eos_token_ids=[]).stats
    assert 0 < len(drafter.read) < stats.rounds
    assert_read_of_the_whole_text(llama, drafter)


def test_of_a_text_that_goes_on_it_sees_what_is_new(llama):
    drafter = drafter_behind(llama, random_prefix(llama), FixedLength(3), cls=Watched, tree=(4,))
    memory, prompt = PrefixCache(), [3, 5, 7, 9]
    for turn in range(3):
        made = decoded(EagerEngine(llama), prompt, memory, drafter=drafter, max_new_tokens=12)
        assert (drafter.seen > 0) == (turn > 0)
        assert made.stats.reused == drafter.seen
        assert_read_of_the_whole_text(llama, drafter)
        assert made.tokens == transformers_greedy(llama.hf_model, prompt, 12)
        prompt = [*prompt, *made.tokens, 11, 2]


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_it_runs_once_a_round_over_what_stood(llama, kind):
    drafter = drafter_behind(llama, random_prefix(llama), FixedLength(3), kind=kind)
    widths, run = [], type(drafter._prefix_layer).__call__

    class Counted(type(drafter._prefix_layer)):
        def __call__(self, x, context):
            widths.append(x.shape[1])
            return run(self, x, context)

    drafter._prefix_layer.__class__ = Counted
    stats = generate(llama, [1, 2, 3, 4, 5], drafter=drafter, max_new_tokens=24, eos_token_ids=[]).stats
    assert widths[0] == 5  # the prompt
    assert stats.rounds - 1 <= len(widths) <= stats.rounds  # there may be no room to draft in the last one
    assert max(widths[1:]) <= 4


def test_copies_of_a_drafter_decode_side_by_side(llama):
    drafter = drafter_behind(llama, random_prefix(llama), FixedLength(3), cls=Watched)
    prompts = [[1, 2, 3], [9, 8, 7, 6]]
    alone = [generate(llama, p, drafter=drafter, max_new_tokens=20, eos_token_ids=[]) for p in prompts]
    copies = [copy.copy(drafter) for _ in prompts]
    begun = [
        stream_rounds(llama, prompt, drafter=one, max_new_tokens=20, eos_token_ids=[])
        for prompt, one in zip(prompts, copies, strict=True)
    ]
    for _ in range(2):
        for one in begun:
            next(one)
    together = [finished(one)[1] for one in begun]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert [one.stats.accepted for one in together] == [one.stats.accepted for one in alone]
    for one in copies:
        assert_read_of_the_whole_text(llama, one)


# The output.


@given(tokens(16), st.sampled_from(HEAD_KINDS), scales, draft_exits(), branches(), st.sampled_from([0.0, 0.3]))
@settings(max_examples=6)
def test_greedy_output_is_that_of_transformers(each_family, prompt, kind, scale, draft_exit, widths, gate):
    drafter = drafter_behind(
        each_family, random_prefix(each_family, scale=scale), draft_exit, kind=kind, scale=scale,
        target_confidence_threshold=gate, tree=widths, token_ids=torch.arange(3, 60),
    )  # fmt: skip
    ours = generate(each_family, prompt, drafter=drafter, max_new_tokens=16, eos_token_ids=[])
    expected = transformers_greedy(each_family.hf_model, prompt, 16, set())
    near_tie_or_same(each_family.hf_model, prompt, ours.tokens, expected)


@given(tokens(16), scales, branches(), st.integers(1, 20))
@settings(max_examples=12)
def test_captured_greedy_output_is_that_of_transformers(tiny, prompt, scale, widths, length):
    engine = GraphEngine(tiny, like_a_graph, smallest_bucket=8)
    drafter = drafter_behind(tiny, random_prefix(tiny, scale=scale), FixedLength(3), tree=widths)
    ours = generate(tiny, prompt, engine=engine, drafter=drafter, max_new_tokens=length, eos_token_ids=[])
    near_tie_or_same(tiny.hf_model, prompt, ours.tokens, transformers_greedy(tiny.hf_model, prompt, length, set()))


@pytest.mark.parametrize(("widths", "settings_"), [((), PLAIN), ((3, 1, 2), WARPED)], ids=str)
def test_samples_follow_the_full_model(tiny_vocabulary, widths, settings_):  # noqa: F811
    like = tiny_vocabulary.num_layers - 1
    assets = DraftWeights(
        layers=[random_prefix(tiny_vocabulary, scale=0.3, like=like)],
        heads=random_heads(tiny_vocabulary, "hydra", 3, scale=0.3),
    )
    drafter = HeadDrafter(tiny_vocabulary, head_config(tiny_vocabulary, FixedLength(3), tree=widths), assets)
    observed = samples(tiny_vocabulary, drafter, settings_)
    assert p_value(observed, distribution_of_texts(tiny_vocabulary, settings_)) > DOUBT


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, top_k=20, top_p=0.9, seed=1)], ids=["greedy", "random"])
def test_a_round_reads_from_the_device_once(llama, sampling):
    drafter = drafter_behind(llama, random_prefix(llama), FixedLength(3), token_ids=torch.arange(2, 60))
    counts = []
    for length in (24, 1, 24):  # at first what depends on a tree's shape alone comes to the device, to stay
        with HostReads() as reads:
            made = generate(
                llama, [1, 2, 3], drafter=drafter, sampling=sampling, max_new_tokens=length, eos_token_ids=[]
            )
        counts.append(reads.count)
    assert counts[2] - counts[1] == made.stats.rounds > 2


def test_a_model_in_bfloat16_drafts_with_heads_behind_a_layer():
    model = LayerSkipModel(tiny_llama().to(torch.bfloat16))
    drafter = drafter_behind(model, random_prefix(model), FixedLength(3))
    assert generate(model, [1, 2, 3], drafter=drafter, max_new_tokens=12, eos_token_ids=[]).stats.drafted
