"""``layerskip apply``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.common import (
    CompileOption,
    CorpusOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    JsonOption,
    ModelOption,
    ProfileArgument,
    RunOptions,
    counted,
    describe_generation,
    generation_line,
    open_model_of,
    print_json,
    quiet_libraries,
    stderr,
)
from layerskip.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from layerskip import Sampling
    from layerskip.drafting.drafter import Drafter
    from layerskip.engine import Engine
    from layerskip.generation import Generation
    from layerskip.tokenizer import Prompt

# Enough that every kernel and buffer has been used once.
_WARM_UP_TOKENS = 8


def apply(
    profile: ProfileArgument,
    prompt: Annotated[str | None, typer.Argument(help="The prompt.", show_default="read from stdin")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file of prompts, one per line, or .jsonl with 'prompt' or 'messages'.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Do not wrap prompts in the model's chat template.")] = False,
    interactive: Annotated[
        bool,
        typer.Option("--interactive", "-i", help="Chat: read one message per line and keep the conversation."),
    ] = False,
    show_drafted: Annotated[
        bool,
        typer.Option("--show-drafted", help="With --interactive, colour text that was drafted and accepted."),
    ] = False,
    corpus: CorpusOption = None,
    model: ModelOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from this many most likely tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens of this total probability.")] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="Seed for reproducible sampling.", show_default="a new one each time")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the text after this string; repeatable.")] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also decode without the draft, and print both speeds and, if greedy, whether outputs are identical.",
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Use the draft even if it was measured to be slower than plain decoding.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    engine: EngineOption = "auto",
    compiled: CompileOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Decode a prompt with a draft profile. The output is that of the target model, streamed as it is generated."""
    from cli.chat_session import converse
    from layerskip import Chat, Sampling, StopStrings, generate, load_profile
    from layerskip.engine import EagerEngine, make_engine
    from layerskip.tokenizer import encode_corpus

    quiet_libraries()
    if interactive:
        _refuse_together("--interactive", {"--prompts": prompts is not None, "--raw": raw, "--compare": compare})
    if show_drafted:
        _refuse_together("--show-drafted", {"--json": json})
        if not interactive:
            raise InvalidInputError("--show-drafted needs --interactive")
    loaded = load_profile(profile, device=device, dtype=dtype)
    sampling = Sampling(temperature, top_k, top_p, seed)
    given = [] if interactive else _read_prompts(prompt, prompts)
    layers, tokenizer = open_model_of(loaded, model, RunOptions(device, dtype, engine, compiled))
    known = None if corpus is None else encode_corpus(tokenizer, corpus)
    drafter: Drafter | None = loaded.drafter(layers, known)  # also checks that the profile is for this model
    if not (loaded.pays or force or compare):
        drafter = None
        stderr.print("the profile was measured to be slower than plain decoding: not drafting; --force drafts")
    needs_costs = drafter is not None or engine != EagerEngine.name
    runner: Engine = make_engine(layers, engine, in_place=True) if needs_costs else EagerEngine(layers)
    if ignored := _ignored(sampling):
        stderr.print(f"{ignored}: no effect without --temperature, as decoding is greedy")
    stopping = StopStrings(tokenizer, stop) if stop else None
    if interactive:
        chat = Chat(layers, tokenizer, engine=runner, drafter=drafter, sampling=sampling, max_new_tokens=max_new_tokens)
        converse(chat, prompt, stopping, speculative=drafter is not None, show_drafted=show_drafted, json=json)
        return

    encoded = [_encode(item, tokenizer, raw) for item in given]
    _check_lengths(encoded, layers.context_length)
    decode = partial(generate, layers, engine=runner, sampling=sampling, max_new_tokens=max_new_tokens, stop=stopping)
    if compare:  # the first passes of a process are slow
        for warmed in (copy(drafter), None):
            decode(encoded[0], drafter=warmed, max_new_tokens=max_new_tokens if runner.captures else _WARM_UP_TOKENS)
    results = []
    for ids in encoded:
        # With a seed a text shall not depend on those before it, from which a drafter learns.
        drafting = partial(decode, ids, drafter=copy(drafter) if temperature else drafter)
        generation = drafting() if json else _print_text(drafting, tokenizer)
        text = str(tokenizer.decode(generation.tokens, skip_special_tokens=True))
        result = describe_generation(generation, text, speculative=drafter is not None)
        if compare:
            result |= _comparison(generation, decode(ids), sampling)
        if not json:
            stderr.print(generation_line(result), style="dim")
        results.append(result)
    if json:
        print_json({"results": results} if prompts else results[0])


def _refuse_together(option: str, others: dict[str, bool]) -> None:
    """Raise an ``InvalidInputError`` if an option was given with another that it excludes."""
    for other, was_given in others.items():
        if was_given:
            raise InvalidInputError(f"{other} cannot be combined with {option}")


def _read_prompts(prompt: str | None, file: Path | None) -> list[Prompt]:
    """The prompts of the argument, the file or stdin, of which only one may be given."""
    from layerskip.tokenizer import Prompt, read_prompts, text_of

    if prompt is not None and file is not None:
        raise InvalidInputError("give a prompt or --prompts, not both")
    if file is not None:
        return read_prompts(file)
    if prompt is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise InvalidInputError("no prompt; give it as an argument, with --prompts FILE or on stdin")
        try:
            prompt = text_of(sys.stdin.read())
        except UnicodeDecodeError as error:
            raise InvalidInputError(f"stdin: not {error.encoding} text") from error
    if not prompt.strip():
        raise InvalidInputError("the prompt is empty")
    return [Prompt(prompt)]


def _encode(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, raw: bool) -> list[int]:
    from layerskip.tokenizer import encode_raw

    if not raw:
        return prompt.encode(tokenizer)
    if not isinstance(prompt.content, str):
        raise InvalidInputError("--raw: 'messages' need the model's chat template; use a text as 'prompt'")
    return encode_raw(tokenizer, prompt.content)


def _check_lengths(encoded: Sequence[Sequence[int]], context_length: int) -> None:
    """Raise an ``InvalidInputError`` if any prompt does not fit the context, before the first one is decoded."""
    for number, ids in enumerate(encoded, start=1):
        if len(ids) > context_length:
            which = f"prompt {number}" if len(encoded) > 1 else "prompt"
            raise InvalidInputError(
                f"{which}: {counted(len(ids), 'token')} do not fit the model's context of {context_length}; shorten it"
            )


def _ignored(sampling: Sampling) -> str:
    """The sampling options that have no effect, because decoding is greedy."""
    given = {"--top-k": sampling.top_k > 0, "--top-p": sampling.top_p < 1, "--seed": sampling.seed is not None}
    return "" if sampling.temperature else ", ".join(option for option, was_given in given.items() if was_given)


def _print_text(decode: Callable[..., Generation], tokenizer: PreTrainedTokenizerBase) -> Generation:
    """Decode, and print the text as it is generated."""
    from layerskip.tokenizer import StreamingDetokenizer, TextSegment

    detokenizer = StreamingDetokenizer(tokenizer)

    def write(segments: list[TextSegment]) -> None:
        print("".join(segment.text for segment in segments), end="", flush=True)

    generation = decode(on_token=lambda token: write(detokenizer.put(token, drafted=False)))
    write(detokenizer.end())
    print()
    return generation


def _comparison(drafted: Generation, plain: Generation, sampling: Sampling) -> dict[str, Any]:
    """How plain decoding compares. ``same_text`` is None for sampled texts, of which each is another draw."""
    return {
        "plain_tokens_per_second": plain.stats.tokens_per_second,
        "speedup": drafted.stats.tokens_per_second / plain.stats.tokens_per_second,
        "same_text": None if sampling.temperature else drafted.tokens == plain.tokens,
    }
