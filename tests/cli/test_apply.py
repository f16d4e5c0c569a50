"""``layerskip apply``: prompts in, the target model's text out."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from layerskip import generate
from layerskip.packed_linear import packing_available
from layerskip.tokenizer import encode_prompt, encode_raw
from tests.cli.conftest import ENVIRONMENT

KEYS = {"text", "token_ids", "tokens_per_second", "acceptance_rate", "speculative"}
COUNT = 24


@pytest.fixture
def apply(layerskip):
    """Apply a profile to 24 tokens, with an object on stdout."""

    def run(profile, *arguments):
        return layerskip("apply", profile, *arguments, "--max-new-tokens", COUNT, "--json")

    return run


@pytest.fixture
def expected(wrapped, checkpoint):
    """What the target model generates for a prompt, without a draft."""

    def answer(prompt, *, raw=False, count=COUNT):
        encode = encode_raw if raw else encode_prompt
        return generate(wrapped, encode(checkpoint.tokenizer, prompt), max_new_tokens=count).tokens

    return answer


@pytest.fixture
def text_of(checkpoint):
    return lambda tokens: checkpoint.tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.fixture
def stdin(monkeypatch):
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_the_answer_is_the_target_models_and_one_object_says_how_it_was_made(apply, profile, expected, text_of):
    done = apply(profile, "hello")
    assert (done.status, done.err) == (0, "")
    result = done.object
    assert result.keys() >= KEYS
    assert result["token_ids"] == expected("hello")
    assert result["text"] == text_of(expected("hello"))
    assert result["speculative"] is True
    assert result["tokens"] == COUNT
    assert result["finish_reason"] == "length"
    assert result["tokens_per_second"] > 0
    assert result["acceptance_rate"] == result["accepted"] / result["drafted"]


def test_the_text_is_streamed_to_stdout_and_its_figures_to_stderr(layerskip, profile, expected, text_of):
    done = layerskip("apply", profile, "hello", "--max-new-tokens", COUNT)
    assert done.status == 0
    assert done.out == text_of(expected("hello")) + "\n"
    [figures] = done.err.splitlines()
    assert figures.startswith(f"{COUNT} tokens · ")
    assert "tokens/s · self-speculative · " in figures


def test_raw_prompts_do_without_the_chat_template(apply, profile, expected):
    assert expected("hello") != expected("hello", raw=True)
    assert apply(profile, "hello", "--raw").object["token_ids"] == expected("hello", raw=True)


@pytest.mark.skipif(not packing_available(), reason="needs a build of PyTorch with oneDNN")
@pytest.mark.parametrize("kernels", [True, False])
def test_a_model_in_bfloat16_on_a_processor_without_kernels_for_it_is_named(apply, profile, monkeypatch, kernels):
    monkeypatch.setattr("layerskip.packed_linear.has_kernels_for", lambda dtype: kernels or dtype == torch.float32)
    options = ["--dtype", "bfloat16", "--device", "cpu", "--engine", "eager"]
    named = "this processor has no kernels for bfloat16: " in apply(profile, "hello", *options).err
    assert named == (not kernels)


def test_the_prompt_may_come_from_stdin(apply, profile, expected, stdin):
    stdin("hello")
    assert apply(profile).object["token_ids"] == expected("hello")


def test_the_installed_command_reads_a_pipe_and_writes_one_object(run_command, profile, expected, tmp_path):
    done = run_command("apply", profile, "--max-new-tokens", COUNT, "--json", input="hello", cwd=tmp_path)
    assert (done.status, done.err) == (0, "")
    assert done.object["token_ids"] == expected("hello")


def test_a_file_of_prompts_gives_a_list_of_results(apply, layerskip, profile, expected, text_of, tmp_path):
    lines = [{"prompt": "one"}, {"messages": [{"role": "user", "content": "two"}]}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    results = apply(profile, "--prompts", file).object["results"]
    assert [result["token_ids"] for result in results] == [expected("one"), expected("two")]
    assert all(result.keys() >= KEYS for result in results)
    done = layerskip("apply", profile, "--prompts", file, "--max-new-tokens", COUNT)
    assert done.out == "".join(text_of(expected(prompt)) + "\n" for prompt in ("one", "two"))
    assert len(done.err.splitlines()) == 2


def test_a_file_with_one_prompt_gives_a_list_too(apply, profile, expected, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n")
    [result] = apply(profile, "--prompts", tmp_path / "prompts.txt").object["results"]
    assert result["token_ids"] == expected("one")


def test_messages_cannot_be_raw(apply, profile, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "two"}]}))
    done = apply(profile, "--prompts", file, "--raw")
    assert done.status == 2
    assert done.error.startswith("--raw: ")


def test_the_model_may_lie_elsewhere(apply, make_profile, model_folder, expected, tmp_path):
    moved = make_profile(1.25, model="/no/longer/there")
    lost = apply(moved, "hello")
    assert lost.status == 1
    assert "/no/longer/there" in lost.error
    shutil.copytree(model_folder, tmp_path / "elsewhere")
    assert apply(moved, "hello", "--model", tmp_path / "elsewhere").object["token_ids"] == expected("hello")


def test_a_model_of_other_sizes_is_refused(apply, profile, narrow_model_folder):
    done = apply(profile, "hello", "--model", narrow_model_folder)
    assert done.status == 1
    assert done.error.startswith(f"{profile}: model.intermediate_size: ")


def test_other_weights_of_the_same_sizes_are_taken_with_one_line(run_command, profile, other_model_folder):
    done = run_command("apply", profile, "hello", "--model", other_model_folder, "--max-new-tokens", 4, "--json")
    assert done.status == 0
    assert "was measured on other weights of these sizes" in done.err


def test_sampling_is_repeatable_by_its_seed_and_new_without_one(apply, profile, expected):
    def sampled(*seed):
        return tuple(apply(profile, "hello", "--temperature", "2", *seed).object["token_ids"])

    assert sampled("--seed", 3) == sampled("--seed", 3)
    assert len({sampled("--seed", 3), sampled("--seed", 4), sampled(), sampled(), tuple(expected("hello"))}) == 5


@pytest.mark.parametrize("narrowed", [["--top-k", 1], ["--top-p", 1e-9], ["--temperature", 1e-6]])
def test_sampling_among_one_token_is_greedy(apply, profile, expected, narrowed):
    assert apply(profile, "hello", "--temperature", 2, *narrowed).object["token_ids"] == expected("hello")


@pytest.mark.parametrize(
    ("options", "ignored"),
    [
        (["--top-p", 0.9], "--top-p"),
        (["--top-k", 5, "--seed", 1], "--top-k, --seed"),
        (["--temperature", 1, "--seed", 1], None),
    ],
)
def test_what_says_how_to_sample_is_said_to_have_no_effect_where_decoding_is_greedy(apply, profile, options, ignored):
    done = apply(profile, "hello", *options)
    assert done.status == 0
    assert done.err == (f"{ignored}: no effect without --temperature, as decoding is greedy\n" if ignored else "")


@pytest.mark.parametrize("text", ["hello\n", "hello\r\n", "\ufeffhello\n"])
def test_a_prompt_from_stdin_is_that_of_the_argument(apply, profile, expected, stdin, text):
    stdin(text)
    assert apply(profile).object["token_ids"] == expected("hello")


def test_a_closed_stdin_is_wrong_usage(apply, profile, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    done = apply(profile)
    assert (done.status, done.error) == (2, "no prompt; give it as an argument, with --prompts FILE or on stdin")
    done = apply(profile, "--interactive")
    assert (done.status, done.error) == (2, "stdin: is closed; a conversation reads its messages there")


def test_a_prompt_that_is_no_text_is_wrong_usage(apply, profile, stdin):
    stdin("caf\udce9")  # as Python reads a byte that is not UTF-8 in the C locale, and on a command line
    for arguments in ([], ["caf\udce9"], ["--raw", "caf\udce9"]):
        done = apply(profile, *arguments)
        assert (done.status, done.error) == (2, "prompt: character 4 is not valid UTF-8")


def test_stdin_that_is_no_text_is_wrong_usage(apply, profile, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    done = apply(profile)
    assert (done.status, done.error) == (2, "stdin: not utf-8 text")


def test_compare_says_that_the_text_is_the_same_and_how_fast_both_were(apply, layerskip, profile, expected):
    result = apply(profile, "hello", "--compare").object
    assert result["same_text"] is True
    assert result["token_ids"] == expected("hello")
    assert result["speedup"] == pytest.approx(result["tokens_per_second"] / result["plain_tokens_per_second"])
    done = layerskip("apply", profile, "hello", "--compare", "--max-new-tokens", COUNT)
    assert "tokens/s, identical output · speedup " in done.err
    assert done.err.endswith("× (one prompt, timed once: 'layerskip bench' measures)\n")


def test_compare_compares_speeds_alone_where_texts_are_sampled(apply, layerskip, profile):
    sampling = ("hello", "--compare", "--temperature", 2)
    result = apply(profile, *sampling).object
    assert result["same_text"] is None
    assert result["speedup"] == pytest.approx(result["tokens_per_second"] / result["plain_tokens_per_second"])
    done = layerskip("apply", profile, *sampling, "--max-new-tokens", COUNT)
    assert "tokens/s (sampled: outputs differ) · speedup " in done.err


def test_a_profile_that_does_not_pay_does_not_draft_unless_forced(apply, make_profile, expected):
    slow = make_profile(0.8)
    plain = apply(slow, "hello")
    assert plain.status == 0
    assert plain.object["speculative"] is False
    assert plain.object["drafted"] == 0
    assert plain.object["acceptance_rate"] is None
    assert "slower than plain decoding" in plain.err
    assert "--force" in plain.err
    forced = apply(slow, "hello", "--force")
    assert forced.err == ""
    assert forced.object["speculative"] is True
    assert forced.object["drafted"] > 0
    assert plain.object["token_ids"] == forced.object["token_ids"] == expected("hello")


def test_a_profile_that_was_never_measured_is_used(apply, make_profile):
    assert apply(make_profile(None), "hello").object["speculative"] is True


def test_a_profile_that_does_not_pay_can_be_compared(apply, make_profile):
    result = apply(make_profile(0.8), "hello", "--compare").object
    assert result["drafted"] > 0
    assert result["same_text"] is True


def test_the_text_ends_after_a_stop_string(apply, profile, expected, checkpoint):
    whole = expected("hello")
    # A string that one of the later tokens completes, and none before it.
    for end in range(6, COUNT):
        string = checkpoint.tokenizer.decode(whole[end : end + 1])
        if "�" not in string and string not in checkpoint.tokenizer.decode(whole[:end]):
            break
    else:
        pytest.fail("no token of the text is new")
    result = apply(profile, "hello", "--stop", "never said", "--stop", string).object
    assert result["finish_reason"] == "stop"
    assert result["token_ids"] == whole[: end + 1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--temperature", "-1"], "temperature: expected"),
        (["--temperature", "nan"], "temperature: expected"),
        (["--top-k", "-1"], "top_k: expected"),
        (["--top-p", "0"], "top_p: expected"),
        (["--top-p", "1.5"], "top_p: expected"),
        (["--max-new-tokens", "0"], "max_new_tokens: expected"),
        (["--stop", ""], "stop strings: expected"),
        (["--device", "abacus"], "device 'abacus' is not available"),
        (["--dtype", "float3"], "dtype 'float3' is unknown"),
        (["--temperature", "1", "--seed", str(2**64)], "seed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_bad_value_is_wrong_usage_in_one_line(layerskip, profile, arguments, named):
    done = layerskip("apply", profile, "hello", *arguments)
    assert done.status == 2
    assert done.error.startswith(named)


def test_a_prompt_longer_than_the_context_is_wrong_usage(apply, profile):
    done = apply(profile, "x" * 600)
    assert done.status == 2
    assert "do not fit the model's context of 512" in done.error


def test_two_sources_of_prompts_are_wrong_usage(apply, profile, tmp_path):
    done = apply(profile, "hello", "--prompts", tmp_path / "prompts.txt")
    assert (done.status, done.error) == (2, "give a prompt or --prompts, not both")


@pytest.mark.parametrize("prompt", ["", " \n "])
def test_an_empty_prompt_is_wrong_usage_wherever_it_comes_from(apply, profile, stdin, prompt):
    stdin(prompt)
    for arguments in [[], [prompt]]:
        done = apply(profile, *arguments)
        assert (done.status, done.error) == (2, "the prompt is empty")


def test_a_terminal_instead_of_a_prompt_is_wrong_usage(apply, profile, monkeypatch):
    ours, theirs = os.openpty()
    with os.fdopen(ours, "w"), os.fdopen(theirs) as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        done = apply(profile)
    assert done.status == 2
    assert done.error.startswith("no prompt; ")


@pytest.mark.parametrize(("name", "wrong"), [("missing.txt", "No such file"), ("empty.txt", "has no prompt")])
def test_a_bad_file_of_prompts_is_wrong_usage_and_named(apply, profile, tmp_path, name, wrong):
    (tmp_path / "empty.txt").write_text("")
    done = apply(profile, "--prompts", tmp_path / name)
    assert done.status == 2
    assert done.error.startswith(f"{tmp_path / name}: ")
    assert wrong in done.error


def test_a_missing_profile_is_a_failure_and_named(apply):
    done = apply("missing.json", "hello")
    reason = "cannot read the draft profile: No such file or directory; 'layerskip search MODEL' makes one"
    assert (done.status, done.error) == (1, f"missing.json: {reason}")


def test_sublayers_are_compiled_when_asked_to_be(apply, profile, expected, monkeypatch):
    compiled = []
    monkeypatch.setattr("layerskip.engine.compile_sublayers", compiled.append)
    assert apply(profile, "hello").object["token_ids"] == expected("hello")
    assert compiled == []
    assert apply(profile, "hello", "--compile").object["token_ids"] == expected("hello")
    assert len(compiled) == 1


def test_applying_a_profile_imports_nothing_of_the_search_but_its_settings(profile):
    code = f"""
import sys
from cli import main
status = main.run(["apply", {profile!r}, "hello", "--max-new-tokens", "4", "--json"])
print(status, *(name for name in sys.modules if name.startswith(("search.", "studies", "optuna", "plotly"))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert done.stdout.splitlines()[-1] == "0 search.settings"


# A corpus to copy from.


def test_a_corpus_is_copied_from_and_leaves_the_text(apply, make_profile, expected, text_of, tmp_path):
    """The file has what the model is going to say; a draft at whose every place there is a copy drafts more."""
    tokens = expected("Hello")
    (tmp_path / "known.txt").write_text(3 * (text_of(tokens) + " "), encoding="utf-8")
    profile = make_profile(None)
    with_corpus = apply(profile, "Hello", "--corpus", tmp_path / "known.txt", "--force").object
    without = apply(profile, "Hello", "--force").object
    assert with_corpus["token_ids"] == without["token_ids"] == tokens
    assert with_corpus["acceptance_rate"] != without["acceptance_rate"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the corpus: No such file or directory"),
        (b"", "is empty; expected a text to copy drafts from"),
        (b"\xff\xfe\x00", "not a text file; expected a text to copy drafts from"),
    ],
)
def test_a_corpus_that_is_no_text_is_one_line(layerskip, profile, tmp_path, content, message):
    file = tmp_path / "corpus.txt"
    if content is not None:
        file.write_bytes(content)
    done = layerskip("apply", profile, "Hello", "--corpus", file)
    assert done.status == 2
    assert done.err.splitlines()[-1] == f"layerskip: {file}: {message}"
