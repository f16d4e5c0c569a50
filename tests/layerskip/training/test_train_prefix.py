"""Draft heads and the layer before them learn together, and their outputs in training are what they draft."""

from itertools import islice

import pytest
import torch

from layerskip import FixedLength, generate
from layerskip.drafting.draft_layer import DraftLayer
from layerskip.drafting.head_drafter import HeadDrafter, through_layer
from layerskip.drafting.heads import untrained_heads
from layerskip.drafting.weights import DraftWeights
from layerskip.kv_cache import KVCache
from layerskip.skip_set import SkipSet
from layerskip.training import TrainableDraft, TrainingSettings, train
from layerskip.training.evaluation import Scorer, frozen, head_costs_by_weights
from tests.models import LAYERS, head_config, near_tie_or_same, random_heads, random_prefix, transformers_greedy

HEADS = 3
TOP = 2 * LAYERS


def untrained(model):
    heads = untrained_heads("hydra", HEADS, model.config.hidden_size)
    return TrainableDraft(model, DraftWeights(layers=[DraftLayer.identity(model)], heads=heads))


def settings(**others):
    return TrainingSettings(**{"loss": "kl", "epochs": 6, "batch_positions": 64, "learning_rate": 3e-3} | others)


def test_untrained_its_outputs_are_those_of_untrained_heads(writer, shards):
    texts = shards.held_out(200)
    with frozen(writer):
        scorer = Scorer(writer, writer.stack_of(SkipSet(LAYERS)), "kl")
        heads = untrained_heads("hydra", HEADS, writer.config.hidden_size)
        drafts = (TrainableDraft(writer, DraftWeights(heads=heads)), untrained(writer))
        alone, after_layer = (scorer.agreement(draft, [texts]) for draft in drafts)
    assert after_layer.loss == pytest.approx(alone.loss)
    assert after_layer.by_place == alone.by_place


def test_layer_and_heads_learn_and_do_better_on_held_out_texts(writer, shards):
    draft = untrained(writer)
    before = {name: weight.detach().clone() for name, weight in draft.weights.named_parameters()}
    own = {name: weight.clone() for name, weight in writer.hf_model.state_dict().items()}
    trained = train(writer, draft, shards, settings(learning_rate=1e-2))
    first = trained.evaluations[0].agreement
    assert trained.agreement.loss < 0.98 * first.loss
    assert (trained.weights.heads.kind, trained.weights.heads.count) == ("hydra", HEADS)
    [layer] = trained.weights.layers
    assert (layer.start, layer.stop, layer.like) == (TOP, TOP, LAYERS - 1)
    learned = dict(trained.weights.named_parameters())
    assert learned.keys() == before.keys()
    assert not any(torch.equal(weight, before[name]) for name, weight in learned.items())
    assert all(torch.equal(weight, own[name]) for name, weight in writer.hf_model.state_dict().items())


def test_its_outputs_are_those_of_heads_after_one_pass_over_each_text(writer, shards):
    """Whatever other texts, longer or shorter, are in the batch."""
    prefix, heads = random_prefix(writer), random_heads(writer, "hydra", HEADS)
    draft, texts = TrainableDraft(writer, DraftWeights(layers=[prefix], heads=heads)), shards.held_out(100)
    layer = prefix
    assert len({len(text.tokens) for text in texts}) > 1
    with torch.no_grad():
        guesses = draft.outputs(texts)
        for place, guess in enumerate(guesses):
            expected = []
            for text in texts:
                cache = KVCache(num_layers=0, capacity=len(text.tokens))
                states = through_layer(writer, layer, text.states[1].float(), cache)
                for at in range(text.prompt_length - 1, len(text.tokens) - place - 2):
                    known = writer.embed(text.tokens[at + 1 : at + place + 2].long())
                    expected.append(heads.at(place, states[at][None], known))
            torch.testing.assert_close(guess.states, torch.cat(expected), atol=1e-3, rtol=1e-3)


def test_what_was_trained_is_what_drafts(writer, shards):
    """The first head's agreement while decoding is near that on the texts, and the output is the target model's."""
    trained = train(writer, untrained(writer), shards, settings())
    drafter = HeadDrafter(writer, head_config(writer, FixedLength(1)), trained.weights)
    texts = list(islice(shards.learned(), 50))
    accepted = drafted = 0
    for text in texts:
        prompt = text.tokens[: text.prompt_length].tolist()
        generation = generate(writer, prompt, drafter=drafter, max_new_tokens=12, eos_token_ids=[])
        near_tie_or_same(writer.hf_model, prompt, generation.tokens, transformers_greedy(writer.hf_model, prompt, 12))
        accepted, drafted = accepted + generation.stats.accepted, drafted + generation.stats.drafted
    with frozen(writer):
        scorer = Scorer(writer, writer.stack_of(SkipSet(LAYERS)), "kl")
        draft = TrainableDraft(writer, trained.weights)
        expected = scorer.agreement(draft, [texts]).top[1]
    assert accepted / drafted == pytest.approx(expected, abs=0.12)


def test_a_training_that_was_stopped_ends_like_one_that_was_not(writer, shards, tmp_path):
    whole = train(writer, untrained(writer), shards, settings(epochs=3))

    def stop_at_the_third(evaluation, evaluations=[]):  # noqa: B006
        evaluations.append(evaluation)
        if len(evaluations) == 3:
            raise KeyboardInterrupt

    stopped = train(writer, untrained(writer), shards, settings(epochs=3), folder=tmp_path, observe=stop_at_the_third)
    assert stopped.interrupted
    resumed = train(writer, untrained(writer), shards, settings(epochs=3), folder=tmp_path)
    assert resumed.evaluations[0].progress == pytest.approx(stopped.evaluations[-1].progress)
    assert resumed.agreement.loss == pytest.approx(whole.agreement.loss, rel=1e-3)


def test_it_is_a_training_of_its_own(writer, shards, tmp_path):
    heads = untrained_heads("hydra", HEADS, writer.config.hidden_size)
    for draft in (TrainableDraft(writer, DraftWeights(heads=heads)), untrained(writer)):
        train(writer, draft, shards, settings(epochs=1), folder=tmp_path)
    assert len(list(tmp_path.glob("training-*.pt"))) == 2


def test_a_draft_reads_the_layer_once_however_long_it_is(llama):
    heads, full = untrained_heads("hydra", 2, 32), sum(one.num_weights for one in llama.sublayers) + 64 * 32
    alone = head_costs_by_weights(llama, heads, llama.target_stack)
    behind = head_costs_by_weights(llama, heads, llama.target_stack, DraftLayer.identity(llama))
    layer = sum(one.num_weights for one in llama.sublayers[-2:])
    assert behind == pytest.approx([cost + layer / full for cost in alone])
