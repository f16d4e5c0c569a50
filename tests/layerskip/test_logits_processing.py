"""Samples under logits processors follow the distribution that ``generate`` samples from: chi-square tests.

As in ``test_exactness_of_sampling``: four tokens, so that the distribution over whole texts can be written out, and
mistakes on purpose that the tests must notice. Most tests spare themselves the model: its logits depend on the position
alone, and the processors bring in the text.
"""

from collections import Counter

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from layerskip import ConfidenceThreshold, DraftConfig, LayerSkipModel, SkipSet, generate
from layerskip import logits_processing as processed
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.engine import DraftStep
from layerskip.logits_processing import GenerationHistory, ProcessorSampler, ProcessorSampling
from layerskip.sampling import Draft, GreedySampler, RandomSampler
from tests.layerskip.test_sampling_exactness import CERTAINTY, DOUBT, LENGTH, PROMPT, VOCABULARY, p_value
from tests.models import tiny_llama

N = 600
CPU = torch.device("cpu")
TARGET = 1.5 * torch.randn(LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(0))
DRAFT = 1.5 * torch.randn(LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(1))


class Bias:
    """A caller's own processor, which drafts do without: it favours the token that follows the newest."""

    def __call__(self, input_ids, scores):
        return scores.index_add(1, (input_ids[0, -1:] + 1) % VOCABULARY, torch.full((1, 1), 2.0))


RULES = {
    "temperature, top-k and top-p": [TemperatureLogitsWarper(1.5), TopKLogitsWarper(3), TopPLogitsWarper(0.95)],
    "repetition penalty": [RepetitionPenaltyLogitsProcessor(4.0), TemperatureLogitsWarper(1.2)],
    "no repeated pair": [NoRepeatNGramLogitsProcessor(2)],
    "no token 2 yet": [MinNewTokensLengthLogitsProcessor(len(PROMPT), 2, 2), TopPLogitsWarper(0.9)],
    "the caller's own": [Bias(), SuppressTokensLogitsProcessor([1])],
}


def distribution_of_texts(logits_behind, processors):
    """The probability of every text of ``LENGTH`` tokens, one token at a time, as ``generate`` would go.

    Args:
        logits_behind: Called with the new tokens so far; gives ``[VOCABULARY]``.
        processors: Applied to them.
    """
    probabilities = {(): 1.0}
    for _ in range(LENGTH):
        longer = {}
        for text, probability in probabilities.items():
            ids = torch.tensor([[*PROMPT, *text]])
            scores = LogitsProcessorList(processors)(ids, logits_behind(text)[None].clone())
            for token, p in enumerate(scores.double().softmax(-1)[0].tolist()):
                longer[*text, token] = probability * p
        probabilities = longer
    return probabilities


def by_position(text):
    return TARGET[len(text)]


def sampling_by(processors, do_sample=True, criteria=(), **kept):
    history = GenerationHistory(torch.tensor([PROMPT]), StoppingCriteriaList(criteria), **kept)
    return ProcessorSampling(history, LogitsProcessorList(processors), do_sample, VOCABULARY)


def text_by(sampler, token_ids=None):
    """A text of ``LENGTH`` tokens by the rounds that decoding goes through, with drafts of two tokens."""
    tokens = sampler.draw(TARGET[0]).tokens.tolist()
    while len(tokens) < LENGTH:
        at = len(tokens)
        rows = [row if token_ids is None else row[token_ids] for row in DRAFT[at : min(at + 2, LENGTH - 1)]]
        draws = [sampler.draft(DraftStep.of(row, token_ids, None), token_ids) for row in rows]
        tokens += sampler.verify(Draft.of(draws, CPU, token_ids=token_ids), TARGET[at : at + len(draws) + 1]).tokens
    return tuple(tokens)


def counted(texts):
    torch.manual_seed(0)
    return Counter(texts)


@pytest.mark.parametrize(
    ("rules", "token_ids"),
    [*((rules, None) for rules in RULES), ("repetition penalty", torch.tensor([0, 2, 3]))],
    ids=[*RULES, "repetition penalty, draft vocabulary"],
)
def test_samples_under_rules_follow_the_target(rules, token_ids):
    samplers = (sampling_by(RULES[rules], keep_scores=True).sampler(CPU) for _ in range(N))
    observed = counted(text_by(sampler, token_ids) for sampler in samplers)
    assert p_value(observed, distribution_of_texts(by_position, RULES[rules])) > DOUBT


def test_samples_of_a_model_follow_it_under_rules():
    """The same through the whole loop, and without what keeping scores changes."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LayerSkipModel(tiny_llama(vocab_size=VOCABULARY, num_hidden_layers=2, seed=4, **sizes))
    drafter = LayerSkipDrafter(
        model, DraftConfig(SkipSet(2, (), (1,)), stopping=ConfidenceThreshold(0.5, max_length=3))
    )
    rules = RULES["repetition penalty"]

    @torch.inference_mode()
    def logits_behind(text):
        return model.hf_model(torch.tensor([[*PROMPT, *text]])).logits[0, -1]

    settings = {"max_new_tokens": LENGTH, "eos_token_ids": ()}
    observed = counted(
        tuple(generate(model, PROMPT, drafter=drafter, sampling=sampling_by(rules), **settings).tokens)
        for _ in range(N // 2)
    )
    assert p_value(observed, distribution_of_texts(logits_behind, rules)) > DOUBT


# Would a mistake show? Each of these is one.


def stands_always(drafted, draft, target, generator):
    return drafted


def replaced_from_the_target(drafted, draft, target, generator):
    if float(torch.rand(1, generator=generator)) * draft[drafted] < target[drafted]:
        return drafted
    return torch.multinomial(target, 1, generator=generator)


@pytest.mark.parametrize("broken", [stands_always, replaced_from_the_target])
def test_a_broken_acceptance_rule_is_noticed(monkeypatch, broken):
    monkeypatch.setattr(processed, "speculative_choice", broken)
    rules = RULES["repetition penalty"]
    observed = counted(text_by(sampling_by(rules).sampler(CPU)) for _ in range(N))
    assert p_value(observed, distribution_of_texts(by_position, rules)) < CERTAINTY


class LagsBehind(RepetitionPenaltyLogitsProcessor):
    """What processing every position of a round with the text before the round would do."""

    def __call__(self, input_ids, scores):
        return super().__call__(input_ids[:, : len(PROMPT)], scores)


def test_rules_applied_to_a_text_that_lags_behind_are_noticed():
    rules = RULES["repetition penalty"]
    observed = counted(text_by(sampling_by([LagsBehind(4.0), *rules[1:]]).sampler(CPU)) for _ in range(N))
    assert p_value(observed, distribution_of_texts(by_position, rules)) < CERTAINTY


# Which way tokens are chosen


@pytest.mark.parametrize(
    ("processors", "do_sample", "kept", "kind"),
    [
        ([], False, {}, GreedySampler),
        ([], True, {}, RandomSampler),
        (RULES["temperature, top-k and top-p"], True, {}, RandomSampler),
        (RULES["temperature, top-k and top-p"], True, {"keep_scores": True}, ProcessorSampler),
        ([], False, {"keep_logits": True}, ProcessorSampler),
        (RULES["repetition penalty"], True, {}, ProcessorSampler),
        (RULES["the caller's own"], False, {}, ProcessorSampler),
    ],
)
def test_whole_rounds_are_decided_at_once_where_the_text_does_not_matter(processors, do_sample, kept, kind):
    sampler = sampling_by(processors, do_sample, **kept).sampler(CPU)
    assert type(sampler) is kind


def test_a_history_follows_the_stop_rule_s_tokens():
    """Where samplers do not look at the text, the stop rule is what tells of tokens."""
    seen = []

    def criterion(ids, scores):
        seen.append(ids.tolist())
        return torch.tensor([ids[0, -1] == 9])

    history = GenerationHistory(torch.tensor([PROMPT]), StoppingCriteriaList([criterion]))
    assert [history.ends_after(text) for text in ([4], [4, 8], [4, 8, 9])] == [False, False, True]
    assert seen == [[[*PROMPT, 4]], [[*PROMPT, 4, 8]], [[*PROMPT, 4, 8, 9]]]
