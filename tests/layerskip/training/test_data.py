"""Texts to train on: the target model's own answers, with the hidden states that it computes over them."""

import pytest
import torch

from layerskip import LayerSkipError, LayerSkipModel
from layerskip.errors import InvalidInputError
from layerskip.training import DataSettings, GivenPrompts, SelfWrittenPrompts, TrainingTextWriter
from tests.layerskip.training.conftest import EXIT, SETTINGS, random_prompts
from tests.models import LAYERS, tiny_llama, tiny_tokenizer, transformers_greedy


def files(shards):
    return [shards.store.folder / f"{name}.safetensors" for name in shards.shards]


def all_texts(shards):
    return [*shards.learned(), *shards.held_out(10**9)]


def test_texts_are_the_target_models_greedy_answers(writer, shards):
    texts = all_texts(shards)
    assert shards.positions == sum(text.new_tokens - 1 for text in texts) >= 1500
    for text in texts[::7]:
        prompt, answer = text.tokens[: text.prompt_length].tolist(), text.tokens[text.prompt_length :].tolist()
        assert answer == transformers_greedy(writer.hf_model, prompt, SETTINGS.max_new_tokens)
        assert text.choices.tolist() == answer[1:]


def test_states_are_those_of_a_pass_over_the_whole_text(writer, shards):
    """Although they were recorded in batches, padded on the left, one token at a time."""
    for text in all_texts(shards)[::9]:
        with torch.inference_mode():
            tokens = text.tokens[:-1].long()
            cache = writer.new_cache(len(tokens))
            context = writer.pass_context(len(tokens), cache)
            before = writer.target_stack.run(writer.embed(tokens), context, stop=2 * EXIT)
            after = writer.target_stack.run(before, context, start=2 * EXIT)
            confidence = writer.logits(after[:, text.draft_positions]).softmax(-1).amax(-1)
        torch.testing.assert_close(text.states.float(), torch.cat([before, after]), atol=2e-2, rtol=2e-2)  # bfloat16
        torch.testing.assert_close(text.confidence, confidence, atol=1e-3, rtol=1e-3)


def test_a_run_that_wants_more_reuses_what_is_there(llama, tmp_path):
    def collect(positions, folder):
        counts = []
        shards = TrainingTextWriter(llama, random_prompts(64), SETTINGS, folder, "f").collect(positions, counts.append)
        return shards, counts

    first, counts = collect(150, tmp_path / "a")
    assert counts[-1] == first.positions
    stamps = {path: path.stat().st_mtime_ns for path in files(first)}
    more, _ = collect(400, tmp_path / "a")
    assert more.shards[: len(first.shards)] == first.shards
    assert {path: path.stat().st_mtime_ns for path in files(first)} == stamps
    at_once, _ = collect(400, tmp_path / "b")
    assert [path.read_bytes() for path in files(at_once)] == [path.read_bytes() for path in files(more)]


def test_a_shard_that_was_cut_short_is_written_again(llama, tmp_path):
    data = TrainingTextWriter(llama, random_prompts(16), SETTINGS, tmp_path, "f")
    [path] = files(data.collect(10))
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    data.collect(10)
    assert path.read_bytes() == whole


def test_sampled_answers_are_the_same_for_the_same_seed(llama, tmp_path):
    def tokens(seed, name):
        settings = DataSettings(EXIT, max_new_tokens=12, temperature=1.0, batch_size=8, seed=seed)
        shards = TrainingTextWriter(llama, random_prompts(8), settings, tmp_path / name, "f").collect(50)
        return [text.tokens.tolist() for text in all_texts(shards)]

    assert tokens(0, "a") == tokens(0, "b") != tokens(1, "c")


def test_the_choice_after_a_sampled_token_is_still_the_likeliest(llama, tmp_path):
    settings = DataSettings(EXIT, max_new_tokens=12, temperature=2.0, batch_size=8)
    shards = TrainingTextWriter(llama, random_prompts(8), settings, tmp_path, "f").collect(50)
    for text in all_texts(shards):
        logits = llama.hf_model(text.tokens[None].long()).logits[0]
        assert text.choices.tolist() == logits.argmax(-1)[text.draft_positions].tolist()


def test_no_prompt_is_both_learned_from_and_held_out(shards):
    def prompts(texts):
        return {tuple(text.tokens[: text.prompt_length].tolist()) for text in texts}

    learned, held_out = prompts(shards.learned()), prompts(shards.held_out(10**6))
    assert learned
    assert held_out
    assert not learned & held_out


@pytest.mark.parametrize(("count", "learned"), [(1, 0), (2, 1), (3, 2)])
def test_of_few_prompts_one_is_held_out_all_the_same(llama, tmp_path, count, learned):
    prompts = GivenPrompts([[number, 3] for number in range(count)])
    shards = TrainingTextWriter(llama, prompts, SETTINGS, tmp_path, "f").collect(10**3)
    assert len(shards.held_out(10**6)) == 1
    assert len(list(shards.learned())) == learned


def test_given_prompts_are_asked_once_a_round():
    given = GivenPrompts([[i] for i in range(10)], rounds=2)
    portions = [given.portion(number, 4) for number in range(6)]
    assert [len(portion) for portion in portions] == [4, 4, 4, 4, 4, 0]
    asked = [prompt for portion in portions for [prompt] in portion]
    assert sorted(asked[:10]) == sorted(asked[10:]) == list(range(10))
    assert asked[:10] != asked[10:]


def test_an_instruction_model_writes_its_own_prompts():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    )
    model = LayerSkipModel(tiny_llama(vocab_size=len(tokenizer), eos_token_id=list(range(20))))
    source = SelfWrittenPrompts(model, tokenizer, seed=3)
    portion = source.portion(1, 64)
    assert portion == source.portion(1, 64) != source.portion(2, 64)
    assert len(portion) > 5
    before, after = tokenizer("<").input_ids, tokenizer(">!").input_ids
    for prompt in portion:
        assert prompt[:1] == before
        assert prompt[-len(after) :] == after
        assert not set(prompt[1 : -len(after)]) & model.eos_token_ids


def test_a_model_without_template_or_end_cannot_write_prompts(llama):
    tokenizer = tiny_tokenizer()
    with pytest.raises(InvalidInputError, match="no chat template to write prompts in; give --prompts"):
        SelfWrittenPrompts(llama, tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(InvalidInputError, match="no end-of-sequence token"):
        SelfWrittenPrompts(llama, tokenizer)


@pytest.mark.parametrize("outside", [LAYERS, LAYERS + 1])
def test_an_exit_outside_the_model_is_refused(llama, tmp_path, outside):
    with pytest.raises(InvalidInputError, match=f"^exit: expected 1 to {LAYERS - 1}, .* got {outside}$"):
        TrainingTextWriter(llama, random_prompts(4), DataSettings(outside), tmp_path, "f")


def test_more_than_the_disk_holds_is_refused_before_anything_is_written(llama, tmp_path):
    data = TrainingTextWriter(llama, random_prompts(4), SETTINGS, tmp_path, "f")
    with pytest.raises(LayerSkipError, match=r"GiB are free; lower --positions"):
        data.collect(10**15)
    assert not list(tmp_path.rglob("*.safetensors"))
