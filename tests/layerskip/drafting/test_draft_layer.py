"""A decoder layer of a draft's own in place of skipped sublayers: lossless, and it has always seen the whole text."""

from datetime import UTC, datetime

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from layerskip import DraftConfig, DraftProfile, FixedLength, LayerSkipModel, SkipSet, generate
from layerskip.drafting.draft_layer import DraftLayer
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import EagerEngine, GraphEngine
from layerskip.errors import InvalidInputError
from layerskip.fingerprint import identify
from layerskip.profile import Provenance
from tests.capture import call_directly
from tests.models import FAMILIES, LAYERS, near_tie_or_same, random_layers, tiny_gemma2, tiny_llama, transformers_greedy
from tests.strategies import draft_exits, tokens

TOP = 2 * LAYERS
# Exit after one layer; a run in the middle with sublayers kept above it; two runs.
RUNS = [{2: TOP}, {3: TOP}, {2: 5}, {1: 3, 5: 7}]


def skip_set_of(runs):
    return SkipSet.from_mask([any(start <= i < stop for start, stop in runs.items()) for i in range(TOP)])


def drafter_with_layers(model, runs, draft_exit, *, like=1, cls=LayerSkipDrafter, token_ids=None, gate=0.0):
    assets = DraftWeights(token_ids=token_ids, layers=random_layers(model, runs, like=like))
    config = DraftConfig(skip_set_of(runs), stopping=draft_exit, target_confidence_threshold=gate)
    return cls(model, config, assets)


@given(
    tokens(20),
    st.sampled_from(RUNS),
    st.sampled_from([0, 1]),
    draft_exits(),
    st.integers(1, 24),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([None, torch.arange(3, 40)]),
)
@settings(max_examples=25)
def test_greedy_output_is_that_of_transformers(tiny, prompt, runs, like, draft_exit, length, gate, token_ids):
    drafter = drafter_with_layers(tiny, runs, draft_exit, like=like, gate=gate, token_ids=token_ids)
    ours = generate(tiny, prompt, drafter=drafter, max_new_tokens=length, eos_token_ids=[])
    near_tie_or_same(tiny.hf_model, prompt, ours.tokens, transformers_greedy(tiny.hf_model, prompt, length, set()))


class Watched(LayerSkipDrafter):
    """Follows the text, and keeps each proposal's logits with the text that it was proposed behind."""

    def start(self, engine, prompt, states):
        super().start(engine, prompt, states)
        self.text, self.seen = prompt.tolist(), []

    def propose(self, newest, cache, limit, sampler):
        steps = []
        engine = self._engine
        draft_step = engine.draft_step
        engine.draft_step = lambda *arguments: steps.append(draft_step(*arguments)) or steps[-1]
        try:
            draft = super().propose(newest, cache, limit, sampler)
        finally:
            del engine.draft_step
        self.last = [*newest.tolist(), *draft.tokens.tolist()]
        for number, step in enumerate(steps):
            self.seen.append(([*self.text, *self.last[: number + 1]], step.logits))
        return draft

    def observe(self, outcome):
        super().observe(outcome)
        self.text += outcome.seen.tolist()


@torch.inference_mode()
def from_scratch(model, stack, text):
    """The draft's stack over a whole text at once, with nothing remembered."""
    cache = model.new_cache(len(text))
    x = stack.run(model.embed(torch.tensor(text)), model.pass_context(len(text), cache))
    return model.logits(x[:, -1:], stack)[0]


@pytest.mark.parametrize("gate", [0.0, 0.25], ids=["always drafting", "not always drafting"])
@pytest.mark.parametrize("start", [2, 3, 6])
@pytest.mark.parametrize("like", [0, 1])
def test_every_proposal_is_that_of_a_pass_over_the_whole_text(tiny, start, like, gate):
    """Whatever stood, was rejected or was never run in the rounds before."""
    drafter = drafter_with_layers(tiny, {start: TOP}, FixedLength(3), like=like, cls=Watched, gate=gate)
    stats = [generate(tiny, [first, 5, 7], drafter=drafter, max_new_tokens=24).stats for first in range(3)]
    assert len(drafter.seen) == stats[-1].drafted
    for text, logits in drafter.seen:
        torch.testing.assert_close(logits, from_scratch(tiny, drafter._stack, text), atol=2e-4, rtol=2e-4)


def test_rounds_that_stand_whole_are_among_those_followed(llama):
    """A stand-in that is the skipped layers' own proposes what the target model chooses: all of it stands."""
    last = DraftLayer.copied(llama, TOP - 2, TOP, LAYERS - 1)
    skip_set = SkipSet(LAYERS, (LAYERS - 1,), (LAYERS - 1,))
    drafter = Watched(llama, DraftConfig(skip_set, stopping=FixedLength(3)), DraftWeights(layers=[last]))
    stats = generate(llama, [1, 5, 7], drafter=drafter, max_new_tokens=24, eos_token_ids=[]).stats
    assert stats.acceptance_rate == 1
    assert stats.rounds < 8
    for text, logits in drafter.seen:
        torch.testing.assert_close(logits, from_scratch(llama, drafter._stack, text), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("runs", RUNS, ids=str)
def test_seeing_the_text_leaves_the_full_models_keys_and_values(tiny, runs):
    stack = drafter_with_layers(tiny, runs, FixedLength(2))._stack
    text = torch.arange(1, 10)
    with torch.inference_mode():
        engine = EagerEngine(tiny)
        cache = engine.new_cache(16)
        engine.prefill(text, cache)
        before = [tuple(part.clone() for part in cache.layer(layer)) for layer in range(LAYERS)]
        engine.draft_step(torch.cat([text, text[:1]]), cache, stack)
        assert cache.length == len(text) + 1
        cache.rollback(len(text))
        for layer in range(LAYERS):
            for ours, theirs in zip(cache.layer(layer), before[layer], strict=True):
                assert torch.equal(ours, theirs)
        assert cache.layer(LAYERS + min(runs))[0].abs().sum() > 0


def test_captured_steps_give_the_text_of_eager_ones():
    for family in FAMILIES.values():
        model = LayerSkipModel(family())
        engines = GraphEngine(model, call_directly, smallest_bucket=8), EagerEngine(model)
        for runs in RUNS:
            ours, expected = (
                generate(
                    model,
                    [3, 1, 4],
                    engine=engine,
                    drafter=drafter_with_layers(model, runs, FixedLength(3)),
                    max_new_tokens=20,
                )
                for engine in engines
            )
            assert ours.tokens == expected.tokens
            assert ours.stats.accepted == expected.stats.accepted


def test_the_model_is_left_alone(llama):
    before = {name: weight.clone() for name, weight in llama.hf_model.state_dict().items()}
    drafter = drafter_with_layers(llama, {2: TOP}, FixedLength(3))
    generate(llama, [1, 2], drafter=drafter, max_new_tokens=8)
    after = llama.hf_model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in after.items())
    assert [layer.self_attn.layer_idx for layer in llama.hf_model.model.layers] == list(range(LAYERS))


def test_a_stand_in_keeps_the_window_of_the_layer_that_it_is_like():
    model = LayerSkipModel(tiny_gemma2())
    windows = [random_layers(model, {2: TOP}, like=like)[0].attention.window for like in (0, 1)]
    assert windows == [model.config.sliding_window, None]


def test_weights_of_another_model_are_refused_in_one_line(llama):
    small = LayerSkipModel(tiny_llama(intermediate_size=16))
    tensors = DraftWeights(layers=random_layers(small, {2: TOP})).tensors()
    with pytest.raises(InvalidInputError, match=r"^draft layer: the weights do not fit this model: .*mlp"):
        DraftWeights.from_tensors(tensors, llama)
    with pytest.raises(InvalidInputError, match="is built like layer 9, but the model has 4 layers"):
        DraftLayer(llama, 2, TOP, 9, {})


def test_draft_layers_ask_for_no_gradient(llama):
    """Neither copies of the model's own layers nor those that were read."""
    weights = DraftWeights(layers=[DraftLayer.copied(llama, 2, TOP, 1)])
    read = DraftWeights.from_tensors(weights.tensors(), llama)
    assert not any(weight.requires_grad for module in (weights, read) for weight in module.parameters())


def test_a_drafter_leaves_the_weights_that_it_was_given_as_they_are(llama):
    """It brings a copy to the model's dtype."""
    weights = DraftWeights(layers=random_layers(llama, {2: TOP}), token_ids=torch.arange(3, 40)).to(torch.bfloat16)
    drafter = LayerSkipDrafter(llama, DraftConfig(skip_set_of({2: TOP}), stopping=FixedLength(2)), weights)
    generate(llama, [1, 2], drafter=drafter, max_new_tokens=4)
    assert {weight.dtype for weight in weights.parameters()} == {torch.bfloat16}
    assert weights.token_ids.dtype == torch.long


def test_a_layer_of_another_precision_is_no_starting_point():
    model = LayerSkipModel(tiny_llama())
    model.hf_model.model.layers[1].mlp.up_proj = torch.nn.Identity()  # as adapters and quantizers replace it
    with pytest.raises(InvalidInputError, match=r"^layer 1: its weights are quantized or adapted"):
        DraftLayer.copied(model, 2, TOP, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_survive_the_round_trip(llama, dtype):
    weights = DraftWeights(token_ids=torch.tensor([3, 9]), layers=random_layers(llama, {1: 3, 5: 8})).to(dtype)
    read = DraftWeights.from_tensors(load(save(weights.tensors())), llama)
    assert read.token_ids.tolist() == [3, 9]
    assert len(read.bridges) == 0
    assert [(layer.start, layer.stop, layer.like) for layer in read.layers] == [(1, 3, 1), (5, 8, 1)]
    expected = weights.state_dict()
    assert read.state_dict().keys() == expected.keys()
    for name, weight in read.state_dict().items():
        assert weight.dtype == expected[name].dtype == (torch.long if name == "token_ids" else dtype)
        assert torch.equal(weight, expected[name])


def test_an_engine_without_stand_ins_sees_one_token_at_a_time(llama):
    """Nothing changes for other drafts."""
    widths = []

    class Counting(EagerEngine):
        def draft_step(self, tokens, cache, stack):
            widths.append(len(tokens))
            return super().draft_step(tokens, cache, stack)

    engine = Counting(llama)
    skipping = LayerSkipDrafter(llama, DraftConfig(SkipSet(LAYERS, (2,)), stopping=FixedLength(3)))
    generate(llama, [1, 2, 3], engine=engine, drafter=skipping, max_new_tokens=20)
    assert set(widths) == {1}
    widths.clear()
    with_layer = drafter_with_layers(llama, {2: TOP}, FixedLength(3))
    generate(llama, [1, 2, 3], engine=engine, drafter=with_layer, max_new_tokens=20)
    assert widths[0] == 4
    assert set(widths[1:]) <= {1, 2}


def test_a_profile_brings_its_layers_along(llama, tmp_path):
    in_half = random_layers(llama, {2: TOP})[0].to(torch.bfloat16)
    assets = DraftWeights(token_ids=torch.arange(3, 40), layers=[in_half])
    profile = DraftProfile.of(
        DraftConfig(skip_set_of({2: TOP}), stopping=FixedLength(3)),
        assets,
        model=identify(llama, "my-model"),
        provenance=Provenance(created=datetime(2026, 1, 2, tzinfo=UTC), tool="a test"),
    )
    profile.save(tmp_path / "profile.json")
    loaded = DraftProfile.load(tmp_path / "profile.json")
    assert loaded == profile
    assert (loaded.tensors.layers, loaded.tensors.bridges) == (1, 0)
    assert loaded.draft == "3 tokens; 1 draft layer; draft vocabulary of 37"
    ours = generate(llama, [1, 2, 3], drafter=loaded.drafter(llama), max_new_tokens=20, eos_token_ids=[])
    at_once = LayerSkipDrafter(llama, DraftConfig(skip_set_of({2: TOP}), stopping=FixedLength(3)), assets)
    expected = generate(llama, [1, 2, 3], drafter=at_once, max_new_tokens=20, eos_token_ids=[])
    assert (ours.tokens, ours.stats.accepted) == (expected.tokens, expected.stats.accepted)
