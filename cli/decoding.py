"""What ``layerskip apply`` does: from prompts to text with figures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cli.common import (
    counted,
)
from layerskip import Chat, DraftProfile, LayerSkipModel, Sampling, StopStrings, generate, load_checkpoint
from layerskip.checkpoints import Checkpoint, resolve_device
from layerskip.engine import EagerEngine, Engine, check_engine, compile_sublayers, make_engine
from layerskip.errors import CheckpointError, InvalidInputError
from layerskip.generation import Generation
from layerskip.tokenizer import Prompt, StreamingDetokenizer, TextSegment, encode_raw, read_prompts

# Enough that every kernel and buffer has been used once.
_WARM_UP_TOKENS = 8


def read_given_prompts(prompt: str | None, file: Path | None) -> list[Prompt]:
    """The prompts from an argument, a file or stdin.

    Raises:
        InvalidInputError: There is none, or more than one source.
    """
    if prompt is not None and file is not None:
        raise InvalidInputError("give a prompt or --prompts, not both")
    if file is not None:
        return read_prompts(file)
    if prompt is None:
        if sys.stdin.isatty():
            raise InvalidInputError("no prompt; give it as an argument, with --prompts FILE or on stdin")
        try:
            prompt = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise InvalidInputError(f"stdin: not {error.encoding} text") from error
    if not prompt.strip():
        raise InvalidInputError("the prompt is empty")
    return [Prompt(prompt)]


def load_for(profile: DraftProfile, model: str | None, *, device: str, dtype: str, engine: str) -> Checkpoint:
    """Load the model of a profile.

    Args:
        profile: Says which model, if ``model`` does not.
        model: Another location of that model.
        device: Device to load it to.
        dtype: Floating-point type to load it in.
        engine: How its passes are going to run: what cannot be is refused before the model is loaded.

    Raises:
        CheckpointError: The model cannot be loaded.
        InvalidInputError: There is no such device, dtype or engine here.
    """
    check_engine(engine, resolve_device(device))
    revision = None if model else profile.revision
    try:
        return load_checkpoint(model or profile.model.id, device=device, dtype=dtype, revision=revision)
    except CheckpointError as error:
        if model is not None:
            raise
        raise CheckpointError(f"{error}; --model names another location of the profile's model") from error


class Decoder:
    """Decodes prompts with a profile, or plainly.

    Args:
        profile: The profile; also says which model to load.
        model: Another location of that model.
        device: Device to load it to.
        dtype: Floating-point type to load it in.
        engine: How passes run.
        compiled: Whether to compile the sublayers.
        sampling: How to choose tokens.
        max_new_tokens: Most tokens to generate.
        stop: Strings that end the text.
        speculative: Whether to draft at all.

    Raises:
        InvalidProfileError: The profile is for another model.
        CheckpointError: The model cannot be loaded.
    """

    def __init__(
        self,
        profile: DraftProfile,
        *,
        model: str | None,
        device: str,
        dtype: str,
        engine: str,
        compiled: bool,
        sampling: Sampling,
        max_new_tokens: int,
        stop: Sequence[str],
        speculative: bool,
    ) -> None:
        checkpoint = load_for(profile, model, device=device, dtype=dtype, engine=engine)
        self.speculative = speculative
        self._tokenizer = checkpoint.tokenizer
        self._model = LayerSkipModel(checkpoint.model)
        if compiled:
            compile_sublayers(self._model)
        self._drafter = profile.drafter(self._model)
        self._engine: Engine = EagerEngine(self._model)
        if speculative or engine != EagerEngine.name:  # plain eager decoding needs no costs
            self._engine = make_engine(self._model, engine)
        self._sampling = sampling
        self._max_new_tokens = max_new_tokens
        self._stop = StopStrings(checkpoint.tokenizer, stop) if stop else None

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, in the model's chat template if it has one."""
        return prompt.encode(self._tokenizer)

    def encode_raw(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt as it is."""
        if not isinstance(prompt.content, str):
            raise InvalidInputError("--raw: 'messages' need the model's chat template; give the text as a 'prompt'")
        return encode_raw(self._tokenizer, prompt.content)

    def check_lengths(self, encoded: Sequence[Sequence[int]]) -> None:
        """Find out before the first prompt is decoded that one does not fit.

        Raises:
            InvalidInputError: It is longer than the model's context.
        """
        context = self._model.context_length
        for number, ids in enumerate(encoded, start=1):
            if len(ids) > context:
                which = f"prompt {number}" if len(encoded) > 1 else "prompt"
                raise InvalidInputError(
                    f"{which}: {counted(len(ids), 'token')} do not fit the model's context of {context}; shorten it"
                )

    def chat(self) -> Chat:
        """A conversation with the model."""
        return Chat(
            self._model,
            self._tokenizer,
            engine=self._engine,
            drafter=self._drafter if self.speculative else None,
            sampling=self._sampling,
            max_new_tokens=self._max_new_tokens,
        )

    @property
    def stop(self) -> StopStrings | None:
        """Ends a text behind the strings that shall end it, if there are such."""
        return self._stop

    def warm_up(self, ids: list[int]) -> None:
        """Decode a few tokens both ways, because the first passes of a process are slow."""
        for drafter in (self._drafter, None):
            length = self._max_new_tokens if self._engine.captures else _WARM_UP_TOKENS
            generate(self._model, ids, engine=self._engine, drafter=drafter, max_new_tokens=length)

    def decode(self, ids: list[int], *, streaming: bool) -> dict[str, Any]:
        """Decode one prompt; with ``streaming``, print its text as it comes."""
        pieces = StreamingDetokenizer(self._tokenizer)

        def write(new: Sequence[TextSegment]) -> None:
            for piece in new:
                print(piece.text, end="", flush=True)

        generation = generate(
            self._model,
            ids,
            engine=self._engine,
            drafter=self._drafter if self.speculative else None,
            sampling=self._sampling,
            max_new_tokens=self._max_new_tokens,
            stop=self._stop,
            on_token=(lambda token: write(pieces.put(token, drafted=False))) if streaming else None,
        )
        if streaming:
            write(pieces.end())
            print()
        text = str(self._tokenizer.decode(generation.tokens, skip_special_tokens=True))
        return described(generation, text, self.speculative)

    def compare(self, ids: list[int], decoded: dict[str, Any]) -> dict[str, Any]:
        """Decode a prompt plainly and set what :meth:`decode` said of it against that.

        ``same_text`` is None where texts are sampled: each is another draw, so that only the speeds can be compared.
        """
        plain = generate(
            self._model,
            ids,
            engine=self._engine,
            sampling=self._sampling,
            max_new_tokens=self._max_new_tokens,
            stop=self._stop,
        )
        return {
            "plain_tokens_per_second": plain.stats.tokens_per_second,
            "speedup": decoded["tokens_per_second"] / plain.stats.tokens_per_second,
            "same_text": None if self._sampling.temperature else decoded["token_ids"] == plain.tokens,
        }


def described(generation: Generation, text: str, speculative: bool) -> dict[str, Any]:
    """A generation as plain values, for JSON and for :func:`in_one_line`."""
    stats = generation.stats
    return {
        "text": text,
        "token_ids": generation.tokens,
        "finish_reason": generation.finish_reason,
        "speculative": speculative,
        "tokens_per_second": stats.tokens_per_second,
        "acceptance_rate": stats.acceptance_rate,
        **asdict(stats),
    }


def in_one_line(result: dict[str, Any]) -> str:
    """The figures of a decoded prompt, for people."""
    parts = [counted(result["tokens"], "token"), f"{result['tokens_per_second']:.1f} tokens/s"]
    parts.append("self-speculative" if result["speculative"] else "plain")
    if result["acceptance_rate"] is not None:
        parts.append(f"{result['acceptance_rate']:.0%} of {counted(result['drafted'], 'drafted token')} accepted")
    if "speedup" in result:
        texts = {True: "and the same text", False: "and another text", None: "(texts are sampled: each is another)"}
        parts.append(f"plainly {result['plain_tokens_per_second']:.1f} tokens/s {texts[result['same_text']]}")
        parts.append(f"speedup {result['speedup']:.2f}×")
    return " · ".join(parts)
