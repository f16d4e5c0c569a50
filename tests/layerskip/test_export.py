"""An exported draft is an ordinary checkpoint: stock transformers computes the draft's logits from it."""

import json
import re
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, SmolLM3Config

from layerskip import AdaptiveThreshold, ConfidenceThreshold, FixedLength, LayerSkipModel, SkipSet, export_draft
from layerskip.draft_model import config_of, draft_model_of, kept_layers
from layerskip.drafting.bridges import Bridge
from layerskip.drafting.weights import DraftWeights
from layerskip.errors import ExportError, InvalidInputError, InvalidProfileError
from tests.layerskip.test_profile import profile_for
from tests.layerskip.test_utils_files import files_no_larger_than
from tests.models import (
    EVERY_FAMILY,
    LAYERS,
    VOCABULARY,
    WINDOW,
    near_tie_or_same,
    random_layers,
    reference_logits,
    tiny_llama,
    transformers_greedy,
)
from tests.strategies import skip_sets, tokens
from tests.unprivileged import closed

TEXT = [int(token) for token in torch.randint(0, VOCABULARY, (3 * WINDOW,), generator=torch.Generator().manual_seed(0))]


def stock(folder):
    """Loaded as anybody would."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@torch.inference_mode()
def logits_of(model, text):
    return model(torch.tensor([text])).logits[0]


def exported(model, tokenizer, folder, skip_set, **parts):
    return export_draft(model, tokenizer, profile_for(model, skip_set=skip_set, **parts), folder)


# The checkpoint computes the draft.


@pytest.mark.parametrize(
    "skip_set",
    [
        SkipSet(LAYERS, (1,), (1,)),
        SkipSet(LAYERS, (2,)),
        SkipSet(LAYERS, (), (0,)),
        SkipSet(LAYERS, (0, 1, 3), (0, 2, 3)),
        SkipSet(LAYERS, (0, 1, 2, 3), (0, 1, 2)),
        SkipSet(LAYERS, (0, 1, 2), (0, 1, 2, 3)),
    ],
    ids=str,
)
def test_stock_transformers_computes_the_draft_s_logits(tmp_path, tiny, byte_tokenizer, skip_set):
    done = exported(tiny, byte_tokenizer, tmp_path / "draft", skip_set)
    loaded = stock(tmp_path / "draft")
    torch.testing.assert_close(
        logits_of(loaded, TEXT), reference_logits(tiny.hf_model, TEXT, skip_set), rtol=1e-4, atol=1e-4
    )
    both = set(skip_set.attention) & set(skip_set.mlp)
    assert done.layers == tuple(sorted(set(range(LAYERS)) - both))
    assert loaded.config.num_hidden_layers == len(loaded.model.layers) == LAYERS - len(both)
    assert done.zeroed == len(skip_set) - 2 * len(both)
    assert done.parameters == sum(weight.numel() for weight in loaded.parameters())


@given(family=st.sampled_from(sorted(EVERY_FAMILY)), skip_set=skip_sets().filter(len), text=tokens(3 * WINDOW))
@settings(max_examples=60)
def test_a_draft_as_a_model_is_the_draft_for_any_family_and_skip_set(family, skip_set, text):
    model = LayerSkipModel(EVERY_FAMILY[family]())
    draft = draft_model_of(model, skip_set)
    torch.testing.assert_close(
        logits_of(draft, text), reference_logits(model.hf_model, text, skip_set), rtol=1e-4, atol=1e-4
    )


@given(skip_set=skip_sets())
def test_the_kept_layers_are_those_with_a_kept_sublayer(skip_set):
    assert set(kept_layers(skip_set)) == {index // 2 for index in skip_set.kept}


def test_making_a_draft_leaves_the_model_as_it_was(byte_tokenizer, tmp_path):
    full = tiny_llama(attention_bias=True, mlp_bias=True)
    before = {name: weight.clone() for name, weight in full.state_dict().items()}
    exported(LayerSkipModel(full), byte_tokenizer, tmp_path / "draft", SkipSet(LAYERS, (0, 2), (2,)))
    assert all(torch.equal(weight, before[name]) for name, weight in full.state_dict().items())
    assert full.config.num_hidden_layers == LAYERS
    assert full.generation_config.num_assistant_tokens is None


def test_biases_of_output_projections_become_zero_too(tmp_path, byte_tokenizer):
    model = LayerSkipModel(tiny_llama(attention_bias=True, mlp_bias=True))
    skip_set = SkipSet(LAYERS, (1,), (2,))
    exported(model, byte_tokenizer, tmp_path / "draft", skip_set)
    expected = reference_logits(model.hf_model, TEXT, skip_set)
    torch.testing.assert_close(logits_of(stock(tmp_path / "draft"), TEXT), expected, rtol=1e-4, atol=1e-4)


def test_each_layer_keeps_its_kind(tmp_path, gemma2, byte_tokenizer):
    skip_set = SkipSet(LAYERS, (0, 1), (0, 1, 2))
    exported(gemma2, byte_tokenizer, tmp_path / "draft", skip_set)
    config = stock(tmp_path / "draft").config
    assert config.layer_types == ["sliding_attention", "full_attention"]
    exported(gemma2, byte_tokenizer, tmp_path / "odd", SkipSet(LAYERS, (0, 2), (0, 2)))
    assert stock(tmp_path / "odd").config.layer_types == ["full_attention", "full_attention"]


def test_lists_with_an_entry_a_layer_keep_those_of_the_kept_layers():
    config = SmolLM3Config(
        num_hidden_layers=6,
        no_rope_layers=[1, 0, 1, 1, 0, 1],
        use_sliding_window=True,
        sliding_window=8,
        eos_token_id=[1, 2, 3, 4, 5, 6],
    )
    kept = config_of(config, (1, 2, 5))
    assert kept.num_hidden_layers == 3
    assert kept.no_rope_layers == [0, 1, 1]
    assert kept.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert kept.eos_token_id == config.eos_token_id
    assert config.num_hidden_layers == len(config.no_rope_layers) == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(tmp_path, byte_tokenizer, dtype):
    model = LayerSkipModel(tiny_llama().to(dtype))
    exported(model, byte_tokenizer, tmp_path / "draft", SkipSet(LAYERS, (1,), (1, 2)))
    assert {weight.dtype for weight in stock(tmp_path / "draft").parameters()} == {dtype}


def test_settings_of_sampling_that_transformers_does_not_save_are_no_hindrance(tmp_path, byte_tokenizer):
    model = LayerSkipModel(tiny_llama())
    settings = model.hf_model.generation_config
    settings.temperature, settings.do_sample, settings.eos_token_id = 0.6, False, [5, 7]
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        model.hf_model.save_pretrained(tmp_path / "model")
    exported(model, byte_tokenizer, tmp_path / "draft", SkipSet(LAYERS, (1,), (1,)))
    assert stock(tmp_path / "draft").generation_config.eos_token_id == [5, 7]
    assert settings.temperature == 0.6


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tmp_path, byte_tokenizer, tied):
    model = LayerSkipModel(tiny_llama(tie_word_embeddings=tied))
    exported(model, byte_tokenizer, tmp_path / "draft", SkipSet(LAYERS, (1,)))
    loaded = stock(tmp_path / "draft")
    assert (loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()) is tied


def test_the_tokenizer_comes_along(tmp_path, llama, byte_tokenizer):
    exported(llama, byte_tokenizer, tmp_path / "draft", SkipSet(LAYERS, (1,)))
    assert AutoTokenizer.from_pretrained(tmp_path / "draft")("stop").input_ids == byte_tokenizer("stop").input_ids
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path / "draft").backend_tokenizer, Tokenizer)


# Trained layers.


def with_trained_layers(model, runs, **made):
    skip_set = SkipSet.from_mask([any(start <= i < stop for start, stop in runs.items()) for i in range(2 * LAYERS)])
    return profile_for(model, DraftWeights(layers=random_layers(model, runs, **made)), skip_set=skip_set)


@torch.inference_mode()
def drafted_logits(model, profile, text):
    stack = model.stack_of(profile.skip_set, stand_ins=profile.weights(model).steps)
    context = model.pass_context(len(text), model.new_cache(len(text)))
    return model.logits(stack.run(model.embed(torch.tensor(text)), context))


@pytest.mark.parametrize(("runs", "like"), [({2: 2 * LAYERS}, 0), ({3: 6}, 1), ({2: 5}, 1), ({1: 3, 5: 7}, 0)], ids=str)
def test_trained_layers_take_their_place_among_the_kept_ones(tmp_path, gemma2, byte_tokenizer, runs, like):
    profile = with_trained_layers(gemma2, runs, like=like)
    done = export_draft(gemma2, byte_tokenizer, profile, tmp_path / "draft")
    loaded = stock(tmp_path / "draft")
    torch.testing.assert_close(logits_of(loaded, TEXT), drafted_logits(gemma2, profile, TEXT), rtol=1e-4, atol=1e-4)
    assert (done.layers, done.trained) == (kept_layers(profile.skip_set), len(runs))
    assert len(loaded.model.layers) == len(done.layers) + done.trained
    assert f"and {len(runs)} trained layer" in (tmp_path / "draft" / "README.md").read_text()


def test_a_trained_layer_is_exported_for_every_family(each_family):
    profile = with_trained_layers(each_family, {1: 5})
    draft = draft_model_of(each_family, profile.skip_set, profile.weights(each_family).layers)
    torch.testing.assert_close(logits_of(draft, TEXT), drafted_logits(each_family, profile, TEXT), rtol=1e-4, atol=1e-4)


def test_trained_layers_of_another_model_are_refused(tmp_path, llama, byte_tokenizer):
    wider = LayerSkipModel(tiny_llama(hidden_size=64))
    layers = DraftWeights(layers=random_layers(wider, {2: 4}))
    foreign = profile_for(llama, layers, skip_set=SkipSet(LAYERS, (1,), (1,)))
    with pytest.raises(InvalidInputError, match="draft layer: the weights do not fit this model"):
        export_draft(llama, byte_tokenizer, foreign, tmp_path / "draft")
    assert list(tmp_path.iterdir()) == []


# As a draft model in transformers.


@pytest.mark.parametrize("skip_set", [SkipSet(LAYERS, (2,)), SkipSet(LAYERS, (1, 2), (1, 2))], ids=str)
def test_assisted_generation_with_it_gives_the_model_s_own_text(tmp_path, tiny, byte_tokenizer, skip_set):
    exported(tiny, byte_tokenizer, tmp_path / "draft", skip_set, stopping=FixedLength(3))
    prompt = torch.tensor([TEXT[:4]])
    out = tiny.hf_model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        assistant_model=stock(tmp_path / "draft"),
        do_sample=False,
        max_new_tokens=20,
        pad_token_id=0,
    )
    expected = transformers_greedy(tiny.hf_model, TEXT[:4], 20)
    near_tie_or_same(tiny.hf_model, TEXT[:4], out[0, 4:].tolist(), expected)


@pytest.mark.parametrize(
    ("draft_exit", "tokens", "threshold"),
    [(FixedLength(5), 5, 0.0), (ConfidenceThreshold(0.7, 6), 6, 0.7), (AdaptiveThreshold(0.8, 9), 9, 0.8)],
)
def test_transformers_drafts_as_many_tokens_as_the_profile_says(
    tmp_path, llama, byte_tokenizer, draft_exit, tokens, threshold
):
    exported(llama, byte_tokenizer, tmp_path / "draft", SkipSet(LAYERS, (1,)), stopping=draft_exit)
    loaded = stock(tmp_path / "draft").generation_config
    assert (loaded.num_assistant_tokens, loaded.assistant_confidence_threshold) == (tokens, threshold)
    assert loaded.num_assistant_tokens_schedule == "constant"


# What has no place in a checkpoint.


def bridged(model):
    size = model.config.hidden_size
    bridge = Bridge(2, 4, [torch.eye(size)], torch.zeros(size))
    weights = DraftWeights(bridges=[bridge], token_ids=torch.tensor([0, 3, 5]))
    return profile_for(model, weights, skip_set=SkipSet(LAYERS, (1,), (1,)))


def test_bridges_are_refused_with_the_reason_and_the_way_out(tmp_path, llama, byte_tokenizer):
    with pytest.raises(InvalidInputError, match=r"bridges \(1\): a bridge is a linear map .*--without-bridges"):
        export_draft(llama, byte_tokenizer, bridged(llama), tmp_path / "draft")
    assert list(tmp_path.iterdir()) == []


def test_without_bridges_the_same_sublayers_are_skipped_and_the_whole_vocabulary_scored(
    tmp_path, llama, byte_tokenizer
):
    profile = bridged(llama)
    export_draft(llama, byte_tokenizer, profile, tmp_path / "draft", without_bridges=True)
    torch.testing.assert_close(
        logits_of(stock(tmp_path / "draft"), TEXT),
        reference_logits(llama.hf_model, TEXT, profile.skip_set),
        rtol=1e-4,
        atol=1e-4,
    )
    card = (tmp_path / "draft" / "README.md").read_text()
    assert "bridges (1) are not in it" in card
    assert "was measured with them and will be lower" in card
    assert "scores the whole vocabulary" in card


def test_a_draft_that_skips_nothing_is_refused(tmp_path, llama, byte_tokenizer):
    with pytest.raises(InvalidInputError, match=r"^nothing is skipped: the draft would be a copy of the whole model"):
        exported(llama, byte_tokenizer, tmp_path / "draft", SkipSet(LAYERS))


def test_a_draft_at_lower_precision_is_refused(tmp_path, llama, byte_tokenizer):
    with pytest.raises(
        InvalidInputError, match=r"^the draft runs at int4: a checkpoint would hold the rounded weights"
    ):
        exported(llama, byte_tokenizer, tmp_path / "draft", SkipSet(LAYERS, (1,)), precision="int4")


def test_another_model_is_refused(tmp_path, llama, byte_tokenizer):
    profile = profile_for(llama)
    with pytest.raises(InvalidProfileError, match="intermediate_size"):
        export_draft(LayerSkipModel(tiny_llama(intermediate_size=16)), byte_tokenizer, profile, tmp_path / "draft")


def test_a_draft_of_other_weights_is_not_said_to_be_the_profile_s_own(tmp_path, llama, byte_tokenizer):
    profile = profile_for(llama)
    other = LayerSkipModel(tiny_llama(seed=1))
    other.config.name_or_path = "me/finetuned"
    export_draft(other, byte_tokenizer, profile, tmp_path / "draft")
    card = (tmp_path / "draft" / "README.md").read_text()
    assert "me/finetuned" in card.splitlines()[card.splitlines().index("---", 1) + 2]
    assert profile.model.id not in card


def test_weights_that_are_not_plain_are_refused_by_name(tmp_path, byte_tokenizer):
    model = LayerSkipModel(tiny_llama())
    attention = model.hf_model.model.layers[3].self_attn
    attention.q_proj.register_buffer("scales", torch.ones(1))  # as a quantized layer has
    profile = profile_for(model, skip_set=SkipSet(LAYERS, (0,)))
    with pytest.raises(ExportError, match=r"^model\.layers\.3\.self_attn\.q_proj\.scales: not a plain weight of Llama"):
        export_draft(model, byte_tokenizer, profile, tmp_path / "draft")
    assert list(tmp_path.iterdir()) == []


def test_a_sublayer_without_a_known_output_projection_is_refused(tmp_path, byte_tokenizer):
    model = LayerSkipModel(tiny_llama())
    mlp = model.hf_model.model.layers[1].mlp
    mlp.expansion = mlp.down_proj
    del mlp.down_proj
    with pytest.raises(ExportError, match=r"^model\.layers\.1\.mlp: half of this layer is skipped, and it has no ou"):
        draft_model_of(model, SkipSet(LAYERS, (), (1,)))


def test_an_architecture_that_takes_more_from_its_layers_than_is_known_is_found_out(tmp_path, llama, byte_tokenizer):
    model = LayerSkipModel(tiny_llama())
    norm = model.hf_model.model.layers[2].self_attn
    norm.scaling = 0.5 * norm.scaling  # of which no configuration tells
    with pytest.raises(ExportError, match=r"^the exported checkpoint gives other logits than the draft \(by up to "):
        exported(model, byte_tokenizer, tmp_path / "draft", SkipSet(LAYERS, (1,), (1,)))
    assert list(tmp_path.iterdir()) == []


# The folder.


def test_an_earlier_export_is_replaced_whole(tmp_path, llama, byte_tokenizer):
    exported(llama, byte_tokenizer, tmp_path / "draft", SkipSet(LAYERS, (1,), (1,)))
    exported(llama, byte_tokenizer, tmp_path / "draft", SkipSet(LAYERS, (1, 2), (1, 2)))
    assert stock(tmp_path / "draft").config.num_hidden_layers == 2
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


def test_an_empty_folder_is_filled_and_missing_ones_are_made(tmp_path, llama, byte_tokenizer):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "some/where"):
        exported(llama, byte_tokenizer, tmp_path / folder, SkipSet(LAYERS, (1,)))
        assert (tmp_path / folder / "config.json").is_file()


def test_a_model_s_own_folder_is_refused_and_stays(tmp_path, llama, byte_tokenizer):
    llama.hf_model.save_pretrained(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with pytest.raises(ExportError, match=r"model: holds what no export wrote \(config\.json\); choose a folder"):
        exported(llama, byte_tokenizer, tmp_path / "model", SkipSet(LAYERS, (1,)))
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_what_somebody_put_into_an_earlier_export_is_not_thrown_away(tmp_path, llama, byte_tokenizer):
    exported(llama, byte_tokenizer, tmp_path / "draft", SkipSet(LAYERS, (1,)))
    (tmp_path / "draft" / "draft.gguf").write_bytes(b"converted")
    with pytest.raises(ExportError, match=r"holds what no export wrote \(draft\.gguf\)"):
        exported(llama, byte_tokenizer, tmp_path / "draft", SkipSet(LAYERS, (2,)))
    assert (tmp_path / "draft" / "draft.gguf").read_bytes() == b"converted"


def test_a_file_is_no_folder(tmp_path, llama, byte_tokenizer):
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="file: cannot write the draft: Not a directory"):
        exported(llama, byte_tokenizer, tmp_path / "file", SkipSet(LAYERS, (1,)))


def test_a_folder_that_cannot_be_written_is_named(public_folder, llama, byte_tokenizer):
    with closed(public_folder), pytest.raises(ExportError, match="draft: cannot write the draft: Permission denied"):
        exported(llama, byte_tokenizer, public_folder / "draft", SkipSet(LAYERS, (1,)))


def test_a_full_disk_leaves_the_earlier_export(tmp_path, llama, byte_tokenizer):
    exported(llama, byte_tokenizer, tmp_path / "draft", SkipSet(LAYERS, (1,), (1,)))
    with files_no_larger_than(20_000), pytest.raises(ExportError, match="draft: cannot write the draft: "):
        exported(llama, byte_tokenizer, tmp_path / "draft", SkipSet(LAYERS, (2,)))
    assert stock(tmp_path / "draft").config.num_hidden_layers == LAYERS - 1
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


def test_a_record_that_is_spoilt_owns_nothing(tmp_path, llama, byte_tokenizer):
    exported(llama, byte_tokenizer, tmp_path / "draft", SkipSet(LAYERS, (1,)))
    (tmp_path / "draft" / "layerskip_export.json").write_text("[]")
    with pytest.raises(ExportError, match="holds what no export wrote"):
        exported(llama, byte_tokenizer, tmp_path / "draft", SkipSet(LAYERS, (2,)))


def test_an_export_can_be_moved(tmp_path, llama, byte_tokenizer):
    exported(llama, byte_tokenizer, tmp_path / "draft", SkipSet(LAYERS, (1,)))
    shutil.move(tmp_path / "draft", tmp_path / "elsewhere")
    exported(llama, byte_tokenizer, tmp_path / "elsewhere", SkipSet(LAYERS, (2,)))
    assert json.loads((tmp_path / "elsewhere" / "layerskip_export.json").read_text())["skip_set"]["attention"] == [2]


# Its README.


def test_the_readme_says_what_it_is_and_how_engines_take_it(tmp_path, llama, byte_tokenizer):
    exported(llama, byte_tokenizer, tmp_path / "draft", SkipSet(LAYERS, (1, 2), (1,)), stopping=FixedLength(6))
    card = (tmp_path / "draft" / "README.md").read_text()
    assert "3 of its 4 layers (0, 2, 3)" in card
    assert "In 1 of these layers one sublayer is skipped" in card
    settings = re.search(r"--speculative-config '(.*)'", card)[1]
    assert json.loads(settings) == {"method": "draft_model", "model": "DIR", "num_speculative_tokens": 6}
    assert "llama-server -m target.gguf -md draft.gguf --spec-type draft-simple --spec-draft-n-max 6" in card
    assert "assistant_model=draft" in card


@pytest.mark.parametrize(
    ("skip_set", "says"),
    [(SkipSet(LAYERS, (1,), (1,)), True), (SkipSet(LAYERS, (0, 1), (0, 1)), False), (SkipSet(LAYERS, (1,)), False)],
)
def test_the_readme_says_when_layers_do_not_follow_the_family_s_pattern(
    tmp_path, gemma2, byte_tokenizer, skip_set, says
):
    exported(gemma2, byte_tokenizer, tmp_path / "draft", skip_set)
    card = (tmp_path / "draft" / "README.md").read_text()
    assert ("longer than the window of 5 tokens" in card) is says


@pytest.mark.parametrize(("family", "kinds"), [("gemma3_text", "layer_types"), ("smollm3", "no_rope_layers")])
def test_the_readme_says_when_layers_out_of_the_pattern_have_other_positions_from_the_first_token_on(
    tmp_path, byte_tokenizer, family, kinds
):
    model = LayerSkipModel(EVERY_FAMILY[family]())
    exported(model, byte_tokenizer, tmp_path / "odd", SkipSet(LAYERS, (0,), (0,)))
    card = (tmp_path / "odd" / "README.md").read_text()
    assert f"`{kinds}` in" in card
    assert "run another draft and accept fewer tokens" in card
    assert "window of" not in card
    exported(model, byte_tokenizer, tmp_path / "even", SkipSet(LAYERS, (0, 1), (0, 1)))
    assert "do not follow the pattern" not in (tmp_path / "even" / "README.md").read_text()


@pytest.mark.slow
def test_the_default_model_s_draft_is_a_checkpoint_too(tmp_path, smollm2):
    model = LayerSkipModel(smollm2.model)
    skip_set = SkipSet(30, tuple(range(10, 16)), tuple(range(11, 17)))
    export_draft(model, smollm2.tokenizer, profile_for(model, skip_set=skip_set), tmp_path / "draft")
    text = smollm2.tokenizer("The sky is blue because").input_ids
    found = logits_of(stock(tmp_path / "draft"), text)
    torch.testing.assert_close(found, reference_logits(smollm2.model, text, skip_set), rtol=1e-4, atol=1e-3)
    assert AutoTokenizer.from_pretrained(tmp_path / "draft").chat_template == smollm2.tokenizer.chat_template
