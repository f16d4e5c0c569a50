"""``layerskip apply``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.common import (
    CompileOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    JsonOption,
    ModelOption,
    ProfileArgument,
    print_json,
    quiet_libraries,
    stderr,
)

if TYPE_CHECKING:
    from layerskip import Sampling


def apply(
    profile: ProfileArgument,
    prompt: Annotated[str | None, typer.Argument(help="The prompt.", show_default="read from stdin")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file of prompts, one a line, or .jsonl with 'prompt' or 'messages'.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Leave prompts as they are, without the model's chat template.")
    ] = False,
    interactive: Annotated[
        bool,
        typer.Option("--interactive", "-i", help="Chat: read message after message, and keep the conversation."),
    ] = False,
    show_drafted: Annotated[
        bool,
        typer.Option("--show-drafted", help="With --interactive, colour what was drafted and accepted."),
    ] = False,
    model: ModelOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among this many likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="Makes sampling repeatable.", show_default="a new one each time")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the text behind this string; may be repeated.")] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Decode plainly as well; print both speeds and, if greedy, whether the text is the same."
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Use the draft even if plain decoding was measured to be faster.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    engine: EngineOption = "eager",
    compiled: CompileOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Decode a prompt with a draft profile. The text is that of the target model, streamed as it comes."""
    from cli.chat_session import check_options, converse
    from cli.decoding import Decoder, in_one_line, read_given_prompts
    from layerskip import Sampling, load_profile

    quiet_libraries()
    check_options(interactive, show_drafted=show_drafted, json=json, prompts=prompts, raw=raw, compare=compare)
    loaded = load_profile(profile, device=device, dtype=dtype)
    sampling = Sampling(temperature, top_k, top_p, seed)
    given = [] if interactive else read_given_prompts(prompt, prompts)
    decoder = Decoder(
        loaded,
        model=model,
        device=device,
        dtype=dtype,
        engine=engine,
        compiled=compiled,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop=stop or [],
        speculative=loaded.pays or force or compare,
    )
    if ignored := _without_effect(sampling):
        stderr.print(f"{ignored}: no effect without --temperature, as decoding is greedy")
    if not decoder.speculative:
        stderr.print(
            "the profile was measured to be slower than plain decoding, so this decodes plainly; --force uses the draft"
        )
    if interactive:
        converse(decoder, prompt, show_drafted=show_drafted, json=json)
        return
    encoded = [decoder.encode_raw(one) if raw else decoder.encode(one) for one in given]
    decoder.check_lengths(encoded)
    if compare:
        decoder.warm_up(encoded[0])
    results = []
    for ids in encoded:
        result = decoder.decode(ids, streaming=not json)
        if compare:
            result |= decoder.compare(ids, result)
        if not json:
            stderr.print(in_one_line(result), style="dim")
        results.append(result)
    if json:
        print_json({"results": results} if prompts else results[0])


def _without_effect(sampling: Sampling) -> str:
    """Options that say how to sample, where nothing is sampled."""
    given = {"--top-k": sampling.top_k > 0, "--top-p": sampling.top_p < 1, "--seed": sampling.seed is not None}
    return "" if sampling.temperature else ", ".join(name for name, was in given.items() if was)
