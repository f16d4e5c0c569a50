"""Self-speculative samples follow the target model's distribution: chi-square tests, and proof that they would notice.

The vocabulary has four tokens, so that the target model's distribution over whole texts can be written out, and a few
hundred texts are enough to see a wrong one. Seeds are fixed: the p-values are the same on every run.
"""

import itertools

import pytest
import torch
from scipy.stats import chisquare

from layerskip import (
    AdaptiveThreshold,
    ConfidenceThreshold,
    DraftConfig,
    FixedLength,
    LayerSkipModel,
    Sampling,
    SkipSet,
)
from layerskip import sampling as sampling_module
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.drafting.weights import DraftWeights
from layerskip.generation import generate
from layerskip.sampling import Draft, Draw, Verdict
from tests.models import random_layers, tiny_llama

VOCABULARY = 4
LENGTH = 4  # one token from the prefill, then at least one round, which may draft two
PROMPT = [1, 3]
SKIPPED = SkipSet(2, (), (1,))
DOUBT, CERTAINTY = 1e-3, 1e-6  # p-values: below the first a sampler is wrong, below the second beyond any doubt


@pytest.fixture(scope="module")
def model():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LayerSkipModel(tiny_llama(vocab_size=VOCABULARY, num_hidden_layers=2, seed=4, **sizes))


def distribution_of_texts(model, settings, skip_set=None):
    """The probability of every text of ``LENGTH`` tokens, from transformers' own forward where nothing is skipped."""
    texts = list(itertools.product(range(VOCABULARY), repeat=LENGTH))
    rows = torch.tensor([[*PROMPT, *text] for text in texts])
    with torch.inference_mode():
        logits = model.hf_model(rows).logits[:, len(PROMPT) - 1 : -1]
    chosen = torch.tensor(texts)[..., None]
    warped = warp(logits.double(), settings)
    return dict(zip(texts, warped.gather(-1, chosen)[..., 0].prod(-1).tolist(), strict=True))


def warp(logits, settings):
    """Temperature, top-k and top-p by their definitions."""
    probabilities = (logits / settings.temperature).softmax(-1)
    ranked, order = probabilities.sort(-1, descending=True)
    kept = torch.arange(VOCABULARY) < (settings.top_k or VOCABULARY)
    ranked = ranked * kept
    ranked = ranked / ranked.sum(-1, keepdim=True)
    ranked = ranked * (ranked.cumsum(-1) - ranked < settings.top_p)
    return torch.zeros_like(ranked).scatter(-1, order, ranked / ranked.sum(-1, keepdim=True))


def p_value(observed, expected):
    """Chi-square test of counted texts against their probabilities; rare texts are counted together."""
    assert {text for text in observed if expected[text] == 0} == set()
    n = sum(observed.values())
    common = [text for text, probability in expected.items() if n * probability >= 5]
    counts = [observed.get(text, 0) for text in common]
    probabilities = [expected[text] for text in common]
    rest = 1 - sum(probabilities)
    if n * rest >= 5:
        counts.append(n - sum(counts))
        probabilities.append(rest)
    return chisquare(counts, [p * sum(counts) / sum(probabilities) for p in probabilities]).pvalue


def samples(model, drafter, settings, n=500):
    """How often each text came."""
    counts = {}
    for seed in range(n):
        sampling = Sampling(settings.temperature, settings.top_k, settings.top_p, seed=seed)
        text = generate(
            model, PROMPT, drafter=drafter, sampling=sampling, max_new_tokens=LENGTH, eos_token_ids=()
        ).tokens
        counts[tuple(text)] = counts.get(tuple(text), 0) + 1
    return counts


PLAIN = Sampling(1.0)
WARPED = Sampling(1.5, top_k=3, top_p=0.95)
EXITS = {
    "fixed": FixedLength(3),
    "confidence": ConfidenceThreshold(0.5, max_length=3),
    "adaptive": AdaptiveThreshold(0.5, max_length=3, step=0.5, threshold_momentum=0.5),
}


@pytest.mark.parametrize(
    ("draft_exit", "settings"),
    [("fixed", PLAIN), ("confidence", PLAIN), ("adaptive", PLAIN), ("fixed", WARPED), ("confidence", WARPED)],
    ids=str,
)
def test_self_speculative_samples_follow_the_full_model(model, draft_exit, settings):
    observed = samples(model, LayerSkipDrafter(model, DraftConfig(SKIPPED, stopping=EXITS[draft_exit])), settings)
    assert p_value(observed, distribution_of_texts(model, settings)) > DOUBT


@pytest.mark.parametrize("skip_set", [SkipSet(2), SKIPPED], ids=str)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_samples_drafted_at_lower_precision_follow_the_full_model(model, precision, skip_set):
    config = DraftConfig(skip_set, precision=precision, stopping=EXITS["fixed"])
    observed = samples(model, LayerSkipDrafter(model, config), WARPED)
    assert p_value(observed, distribution_of_texts(model, WARPED)) > DOUBT


def test_samples_with_a_layer_of_the_drafts_own_follow_the_full_model(model):
    assets = DraftWeights(layers=random_layers(model, {1: 4}))
    drafter = LayerSkipDrafter(model, DraftConfig(SkipSet(2, (1,), (0, 1)), stopping=EXITS["fixed"]), assets)
    assert p_value(samples(model, drafter, PLAIN), distribution_of_texts(model, PLAIN)) > DOUBT


def test_plain_samples_follow_the_full_model(model):
    assert p_value(samples(model, None, PLAIN), distribution_of_texts(model, PLAIN)) > DOUBT


# Would a mistake show? Each of these is one.


def verdict_of(tokens):
    return Verdict(tokens, torch.tensor(tokens[-1:]), tuple(range(len(tokens))))


def accept_everything(tree, drafted, draft, target, generator):
    own = torch.multinomial(target[len(drafted)], 1, generator=generator)
    return verdict_of([*drafted.tolist(), *own.tolist()])


def accept_never(tree, drafted, draft, target, generator):
    """Not a mistake: slow, and exact."""
    return verdict_of(torch.multinomial(target[0], 1, generator=generator).tolist())


def replace_from_the_target(tree, drafted, draft, target, generator):
    """Leviathan's rule, but a rejected token is replaced by a draw from p instead of max(p - q, 0)."""
    for i, token in enumerate(drafted.tolist()):
        if torch.rand((), generator=generator) * draft[i, token] >= target[i, token]:
            own = torch.multinomial(target[i], 1, generator=generator)
            return verdict_of([*drafted[:i].tolist(), *own.tolist()])
    return accept_everything(tree, drafted, draft, target, generator)


def accept_only_the_likeliest(tree, drafted, draft, target, generator):
    """Greedy matching applied to samples."""
    for i, token in enumerate(drafted.tolist()):
        if token != int(target[i].argmax()):
            own = torch.multinomial(target[i], 1, generator=generator)
            return verdict_of([*drafted[:i].tolist(), *own.tolist()])
    return accept_everything(tree, drafted, draft, target, generator)


@pytest.mark.parametrize("broken", [accept_everything, replace_from_the_target, accept_only_the_likeliest])
def test_a_broken_acceptance_rule_is_noticed(model, monkeypatch, broken):
    monkeypatch.setattr(sampling_module, "speculative_sampling", broken)
    observed = samples(model, LayerSkipDrafter(model, DraftConfig(SKIPPED, stopping=EXITS["fixed"])), PLAIN)
    assert p_value(observed, distribution_of_texts(model, PLAIN)) < CERTAINTY


def test_a_slow_but_exact_acceptance_rule_passes(model, monkeypatch):
    monkeypatch.setattr(sampling_module, "speculative_sampling", accept_never)
    observed = samples(model, LayerSkipDrafter(model, DraftConfig(SKIPPED, stopping=EXITS["fixed"])), PLAIN)
    assert p_value(observed, distribution_of_texts(model, PLAIN)) > DOUBT


class KeepsUnsureTokensToItself(LayerSkipDrafter):
    """Stops before a token that it finds unlikely, so that what is proposed depends on which token was drawn."""

    def propose(self, newest, cache, limit, sampler):
        draft = super().propose(newest, cache, limit, sampler)
        sure = len(draft)
        if sure and self._stop.stops_after(float(draft.distributions[-1][draft.tokens[-1]])):
            sure -= 1
        draws = [Draw(draft.tokens[i : i + 1], draft.distributions[i]) for i in range(sure)]
        return Draft.of(draws, newest.device)


def test_a_draft_that_keeps_its_unsure_token_to_itself_is_noticed(model):
    """Why a draft exit looks at the highest probability, which is the same whichever token was drawn."""
    observed = samples(
        model, KeepsUnsureTokensToItself(model, DraftConfig(SKIPPED, stopping=EXITS["confidence"])), PLAIN, 1000
    )
    assert p_value(observed, distribution_of_texts(model, PLAIN)) < CERTAINTY


# A round by itself, with many more samples.


@pytest.mark.parametrize("settings", [PLAIN, WARPED], ids=["temperature 1", "temperature, top-k and top-p"])
def test_a_round_s_tokens_follow_the_target_whatever_the_draft(settings):
    """Two drafted tokens and one more; no distribution depends on a token, so the positions are independent."""
    generator = torch.Generator().manual_seed(0)
    target_logits = torch.randn(3, VOCABULARY, generator=generator)
    draft_logits = target_logits[:2] + torch.randn(2, VOCABULARY, generator=generator)
    sampler = Sampling(settings.temperature, settings.top_k, settings.top_p, seed=0).sampler(torch.device("cpu"))
    counts = [{}, {}, {}]
    for _ in range(4000):
        draft = Draft.of([sampler.draw(logits) for logits in draft_logits], torch.device("cpu"))
        for position, token in enumerate(sampler.verify(draft, target_logits).tokens):
            counts[position][token] = counts[position].get(token, 0) + 1
    assert sum(counts[2].values()) > 1000
    for observed, probabilities in zip(counts, warp(target_logits.double(), settings), strict=True):
        assert p_value(observed, dict(enumerate(probabilities.tolist()))) > DOUBT
