"""The promise, kept on a trained model: 8 prompts, 40 tokens each, token for token against ``model.generate``.

A difference is excused only where the target model's two best logits lie within 1e-3; it is counted and printed.
"""

import pytest

from layerskip import (
    AdaptiveThreshold,
    ConfidenceThreshold,
    DraftConfig,
    FixedLength,
    LayerSkipModel,
    SkipSet,
    generate,
)
from layerskip.drafting.layer_skip import LayerSkipDrafter
from tests.models import near_tie_or_same, transformers_greedy

PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about autumn rain.",
    "def fibonacci(n):",
    "List three uses of a paperclip.",
    "Explain photosynthesis to a child.",
    "If a train travels 60 km in 45 minutes, how fast is it?",
    "1, 1, 2, 3, 5, 8,",
    "Compare cats and dogs as pets.",
]
LENGTH = 40
SKIP_SETS = [
    SkipSet(30, (12, 14, 20), (13, 21)),
    SkipSet(30, (0, 29), ()),
    SkipSet(30, (), (10, 11, 12, 13, 14, 15)),
    SkipSet(30, tuple(range(16, 24)), tuple(range(16, 24))),
]
DRAFT_EXITS = [FixedLength(4), ConfidenceThreshold(0.5), AdaptiveThreshold(), FixedLength(7)]


@pytest.fixture(scope="module")
def parted(request):
    """Numbers of the prompts whose outputs part at a near tie; printed at the end."""
    numbers = []
    yield numbers
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nsmollm2: {len(numbers)} of {len(PROMPTS)} prompts parted at a near tie {numbers or ''}")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_on_the_default_model_greedy_output_is_that_of_transformers(smollm2, parted, number):
    template = smollm2.tokenizer.apply_chat_template
    chat = [{"role": "user", "content": PROMPTS[number]}]
    # Every fourth prompt as it is, the others as a chat turn.
    if number % 4 == 2:
        prompt = smollm2.tokenizer(PROMPTS[number]).input_ids
    else:
        prompt = template(chat, add_generation_prompt=True, return_dict=False)
    model = LayerSkipModel(smollm2.model)
    drafter = LayerSkipDrafter(
        model, DraftConfig(SKIP_SETS[number % 4], stopping=DRAFT_EXITS[(number + number // 4) % 4])
    )
    never = {model.vocab_size}  # an end token that cannot come, so that each text has all its tokens
    ours = generate(model, prompt, drafter=drafter, max_new_tokens=LENGTH, eos_token_ids=never)
    expected = transformers_greedy(smollm2.model, prompt, LENGTH, never)
    assert len(expected) == LENGTH
    if near_tie_or_same(smollm2.model, prompt, ours.tokens, expected):
        parted.append(number)
    assert ours.stats.accepted > 0
