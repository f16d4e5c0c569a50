"""What ``bench`` and ``compare`` decode: built-in prompts, the user's own, or the questions of a standard suite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.common import counted, stderr, times_each
from layerskip.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from layerskip.engine import Engine
    from layerskip.tokenizer import Prompt
    from search.prompts import EncodedPrompt
    from search.suite import Question

_PER_CATEGORY = 5

MeasuredPromptsOption = Annotated[
    Path | None,
    typer.Option(
        help="Prompts, one a line, or .jsonl with 'prompt' or 'messages'.",
        show_default="the built-in ones that searches hold out",
    ),
]
SuiteOption = Annotated[
    Path | None,
    typer.Option(
        help="Questions in Spec-Bench's format, in place of prompts; figures are also given by category.",
        show_default=False,
    ),
]
PerCategoryOption = Annotated[
    int | None,
    typer.Option(help="Questions of each category of --suite.", show_default=str(_PER_CATEGORY), min=1),
]


@dataclass(frozen=True)
class ToMeasure:
    """What ``bench`` and ``compare`` decode: prompts, or the questions of a suite.

    Args:
        own: The user's prompts; None for the built-in ones.
        questions: A suite's; None without one.
    """

    own: Sequence[Prompt] | None
    questions: Sequence[Question] | None

    @classmethod
    def read(cls, prompts: Path | None, suite: Path | None, per_category: int | None) -> ToMeasure:
        """Read the files that were given.

        Raises:
            InvalidInputError: One cannot be read, or both were given.
        """
        from layerskip.tokenizer import read_prompts
        from search.suite import read_suite

        if prompts is not None and suite is not None:
            raise InvalidInputError("--suite and --prompts exclude one another; give one of them")
        if suite is None and per_category is not None:
            raise InvalidInputError("--per-category: is of a suite; give --suite FILE")
        own = None if prompts is None else read_prompts(prompts)
        return cls(own, None if suite is None else read_suite(suite, per_category or _PER_CATEGORY))

    def encoded(
        self, engine: Engine, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
    ) -> Sequence[EncodedPrompt]:
        """As token ids for the engine's model; what does not fit its context is left out of a suite, with a note.

        Raises:
            InvalidInputError: A prompt, or all of a suite, does not fit.
        """
        from search.prompts import prompts_to_measure
        from search.suite import encode_suite

        if self.questions is None:
            context = engine.model.context_length
            return prompts_to_measure(self.own, tokenizer, max_new_tokens=max_new_tokens, context_length=context)
        suite = encode_suite(self.questions, engine, tokenizer, max_new_tokens=max_new_tokens)
        if suite.left_out:
            names = ", ".join(suite.left_out)
            stderr.print(f"too long for the model's context, and left out: {names}", style="dim")
        return suite.prompts

    def announce(self, prompts: int, methods: str, repeats: int) -> None:
        """Say on stderr what is about to be decoded: it may take minutes."""
        stderr.print(f"decoding {counted(prompts, self.what)} {methods}, {times_each(repeats)}")

    @property
    def what(self) -> str:
        """What is decoded, for people: the name of one of them."""
        if self.questions is not None:
            return "question"
        return "held-out built-in prompt" if self.own is None else "prompt"
