"""Draft heads learn to predict the target model's text, and their outputs in training are what they draft."""

import math
from dataclasses import replace
from itertools import islice

import pytest
import torch

from layerskip import FixedLength, generate
from layerskip.drafting.head_drafter import HeadDrafter
from layerskip.drafting.heads import HEAD_KINDS, untrained_heads
from layerskip.drafting.weights import DraftWeights
from layerskip.skip_set import SkipSet
from layerskip.training import TrainableDraft, TrainingSettings, train, vocabulary_of
from layerskip.training.evaluation import Scorer, frozen, head_costs_by_weights
from tests.models import LAYERS, head_config, near_tie_or_same, random_heads, transformers_greedy

HEADS = 3
kinds = pytest.mark.parametrize("kind", HEAD_KINDS)


def some_heads(model, kind):
    return TrainableDraft(model, DraftWeights(heads=untrained_heads(kind, HEADS, model.config.hidden_size)))


def settings(loss="ce", **others):
    return TrainingSettings(**{"loss": loss, "epochs": 6, "batch_positions": 64, "learning_rate": 3e-3} | others)


@kinds
@pytest.mark.parametrize("loss", ["kl", "ce", "both"])
def test_trained_heads_do_better_on_held_out_texts(writer, shards, kind, loss):
    trained = train(writer, some_heads(writer, kind), shards, settings(loss, learning_rate=1e-2))
    first = trained.evaluations[0].agreement
    assert trained.agreement.loss < 0.98 * first.loss
    assert len(trained.agreement.by_place) == HEADS
    before, after = (sum(top[8] for top in found.by_place) for found in (first, trained.agreement))
    assert after > 1.03 * before
    assert (trained.weights.heads.kind, trained.weights.heads.count) == (kind, HEADS)


@kinds
def test_the_models_weights_stay(writer, shards, kind):
    before = {name: weight.clone() for name, weight in writer.hf_model.state_dict().items()}
    train(writer, some_heads(writer, kind), shards, settings(epochs=1))
    assert all(torch.equal(weight, before[name]) for name, weight in writer.hf_model.state_dict().items())
    assert all(weight.grad is None for weight in writer.hf_model.parameters())


@kinds
def test_agreement_is_how_often_the_heads_predict_the_text(writer, shards, kind):
    """Counted by hand, along greedy texts whose next tokens are known."""
    draft = TrainableDraft(writer, DraftWeights(heads=random_heads(writer, kind, HEADS, scale=0.02)))
    heads = draft.weights.heads
    texts = shards.held_out(200)
    right, asked = [0] * HEADS, [0] * HEADS
    with torch.no_grad():
        for text in texts:
            prompt, whole = text.prompt_length, text.tokens.tolist()
            for newest in range(prompt, len(whole)):
                for place in range(HEADS):
                    if newest + place + 1 >= len(whole):
                        continue
                    known = writer.embed(torch.tensor(whole[newest : newest + place + 1]))
                    states = heads.at(place, text.states[1, newest - 1][None].float(), known)
                    asked[place] += 1
                    right[place] += int(writer.logits(states[None])[0].argmax()) == whole[newest + place + 1]
    with frozen(writer):
        scorer = Scorer(writer, writer.stack_of(SkipSet(LAYERS)), "ce")
        agreement = scorer.agreement(draft, [texts[:3], texts[3:]])
    assert agreement.positions == asked[0]
    found = [top[1] for top in agreement.by_place]
    assert found == pytest.approx([count / all_ for count, all_ in zip(right, asked, strict=True)])
    assert sum(right)


@kinds
def test_later_heads_count_less(writer, shards, kind):
    """The loss is the sum of their cross entropies, the k-th times 0.8 to the power of k."""
    draft, texts = some_heads(writer, kind), shards.held_out(100)
    with frozen(writer):
        scorer = Scorer(writer, writer.stack_of(SkipSet(LAYERS)), "ce")
        learned = scorer.learn_from(draft, texts)
        found = scorer.agreement(draft, [texts]).loss
        entropies = [
            torch.nn.functional.cross_entropy(writer.logits(guess.states[None]), guess.choices).item()
            for guess in draft.outputs(texts)
        ]
    expected = sum(0.8 ** (k + 1) * entropy for k, entropy in enumerate(entropies))
    assert [learned, found] == pytest.approx([expected, expected], rel=1e-4)


@kinds
def test_texts_too_short_for_a_head_teach_the_others(writer, shards, kind):
    short = sorted(shards.held_out(10**6), key=lambda text: len(text.choices))[:1]
    [text] = short
    cut = text.prompt_length + 2
    text = replace(text, tokens=text.tokens[:cut], choices=text.choices[:1], states=text.states[:, : cut - 1])
    draft = some_heads(writer, kind)
    with frozen(writer):
        scorer = Scorer(writer, writer.stack_of(SkipSet(LAYERS)), "both")
        assert math.isfinite(scorer.learn_from(draft, [text]))
        assert scorer.agreement(draft, [[text]]).positions == 1


@kinds
def test_what_was_trained_is_what_drafts(writer, shards, kind):
    """The first head's agreement while decoding is near that on the texts, and the output is the target model's."""
    trained = train(writer, some_heads(writer, kind), shards, settings())
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
        expected = scorer.agreement(TrainableDraft(writer, trained.weights), [texts]).top[1]
    assert accepted / drafted == pytest.approx(expected, abs=0.12)


@kinds
def test_a_training_that_was_stopped_ends_like_one_that_was_not(writer, shards, tmp_path, kind):
    whole = train(writer, some_heads(writer, kind), shards, settings(epochs=3))

    def stop_at_the_third(evaluation, evaluations=[]):  # noqa: B006
        evaluations.append(evaluation)
        if len(evaluations) == 3:
            raise KeyboardInterrupt

    stopped = train(
        writer, some_heads(writer, kind), shards, settings(epochs=3), folder=tmp_path, observe=stop_at_the_third
    )
    assert stopped.interrupted
    resumed = train(writer, some_heads(writer, kind), shards, settings(epochs=3), folder=tmp_path)
    assert resumed.evaluations[0].progress == pytest.approx(stopped.evaluations[-1].progress)
    assert resumed.agreement.loss == pytest.approx(whole.agreement.loss, rel=1e-3)


def test_kinds_and_numbers_of_heads_are_trainings_of_their_own(writer, shards, tmp_path):
    for kind in HEAD_KINDS:
        for count in (1, 2):
            heads = untrained_heads(kind, count, writer.config.hidden_size)
            train(
                writer, TrainableDraft(writer, DraftWeights(heads=heads)), shards, settings(epochs=1), folder=tmp_path
            )
    assert len(list(tmp_path.glob("training-*.pt"))) == 4


@kinds
def test_a_draft_vocabulary_comes_along(writer, shards, kind):
    ids = vocabulary_of(writer, shards, 16)
    trained = train(writer, some_heads(writer, kind), shards, settings(epochs=1), token_ids=ids)
    assert trained.weights.token_ids is ids
    assert all(top[8] <= 1 for top in trained.agreement.by_place)
    assert trained.agreement.top[8] <= trained.agreement.coverage < 1


def test_medusas_heads_are_scored_together_and_hydras_one_by_one(llama):
    scoring, size = 64 * 32, 32
    full = sum(sublayer.num_weights for sublayer in llama.sublayers) + scoring
    medusa = head_costs_by_weights(llama, untrained_heads("medusa", 2, size), llama.target_stack)
    block = size * size + size
    assert medusa == pytest.approx([(block + scoring) / full, (2 * block + scoring) / full])
    hydra = head_costs_by_weights(
        llama, untrained_heads("hydra", 2, size), llama.stack_of(SkipSet(LAYERS), token_ids=torch.arange(16))
    )
    first, second = 3 * size * size + size, 4 * size * size + size
    assert hydra == pytest.approx([(first + 512) / full, (first + second + 1024) / full])
