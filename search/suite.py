"""Standard suites of questions, such as Spec-Bench: by category, with conversations of several turns.

Spec-Bench: Xia et al. 2024 (arXiv 2401.07851); its file has a JSON object a line, with ``question_id``, ``category``
and ``turns``. As in its published tables, the kinds of MT-bench count as one category.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from layerskip.engine import Engine
from layerskip.errors import InvalidInputError
from layerskip.generation import generate
from layerskip.tokenizer import encode_chat, encode_prompt
from search.prompts import EncodedPrompt

_MT_BENCH = frozenset(
    ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"),
)


@dataclass(frozen=True)
class Question:
    """A question of a suite.

    Args:
        id: Its number in the suite.
        category: Under which it is counted.
        turns: What the user says, turn by turn.
    """

    id: str
    category: str
    turns: tuple[str, ...]


def read_suite(path: Path, per_category: int) -> list[Question]:
    """Some questions of each category of a suite, spread evenly over the file.

    Args:
        path: The file, in Spec-Bench's format.
        per_category: How many of each category, or all of it where it has fewer.

    Raises:
        InvalidInputError: The file cannot be read, has no question, or a line is none. The message names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path}: not a text file; expected a suite in Spec-Bench's format") from error
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot read the suite: {error.strerror}") from error
    questions = [_question(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not questions:
        raise InvalidInputError(f"{path}: has no question; expected one a line, in Spec-Bench's format")
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.category, []).append(question)
    seen = Counter(question.id for question in questions)
    if repeated := [id for id, times in seen.items() if times > 1]:
        raise InvalidInputError(
            f"{path}: question_id {repeated[0]} is there {seen[repeated[0]]} times; give each its own"
        )
    return [question for category in groups.values() for question in _spread(category, per_category)]


def _spread(questions: Sequence[Question], count: int) -> Iterator[Question]:
    wanted = min(count, len(questions))
    return (questions[place * len(questions) // wanted] for place in range(wanted))


def _question(path: Path, number: int, line: str) -> Question:
    try:
        fields: Any = json.loads(line)
        id, category, turns = fields["question_id"], fields["category"], fields["turns"]
        is_named = isinstance(id, int | str) and isinstance(category, str)
        is_question = is_named and isinstance(turns, list) and bool(turns) and all(isinstance(t, str) for t in turns)
    except (ValueError, KeyError, TypeError, RecursionError):
        is_question = False
    if not is_question:
        raise InvalidInputError(
            f"{path}, line {number}: no question; expected a JSON object with question_id, category and turns"
        )
    return Question(str(id), "mt-bench" if category in _MT_BENCH else category, tuple(turns))


@dataclass(frozen=True)
class EncodedSuite:
    """A suite's questions as token ids.

    Args:
        prompts: Their prompts, in order.
        left_out: Ids of those that do not fit the model's context.
    """

    prompts: tuple[EncodedPrompt, ...]
    left_out: tuple[str, ...]


def encode_suite(
    questions: Sequence[Question], engine: Engine, tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int
) -> EncodedSuite:
    """Encode questions; what the model answered to earlier turns is decoded now, plainly.

    Args:
        questions: The questions.
        engine: Runs the model's passes.
        tokenizer: Its tokenizer; without a chat template only the first turn of each question is asked.
        max_new_tokens: Most tokens of an answer.

    Raises:
        InvalidInputError: None fits the model's context.
    """
    prompts, left_out = [], []
    for question in questions:
        turns = _encoded_turns(question, engine, tokenizer, max_new_tokens)
        if turns is None:
            left_out.append(question.id)
        else:
            *earlier, last = turns
            prompts.append(EncodedPrompt(question.id, last, tuple(earlier), question.category))
    if not prompts:
        raise InvalidInputError(
            f"suite: no question fits the model's context of {engine.model.context_length} tokens with "
            f"{max_new_tokens} new ones; lower --max-new-tokens"
        )
    return EncodedSuite(tuple(prompts), tuple(left_out))


def _encoded_turns(
    question: Question, engine: Engine, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> list[tuple[int, ...]] | None:
    """The prompt of each turn, the conversation before it included; None if one does not fit the model's context."""
    if not tokenizer.chat_template:
        prompts = [tuple(encode_prompt(tokenizer, question.turns[0]))]
        return prompts if _fits(prompts[0], engine, max_new_tokens) else None
    messages: list[dict[str, str]] = []
    encoded: list[tuple[int, ...]] = []
    for number, turn in enumerate(question.turns, start=1):
        messages.append({"role": "user", "content": turn})
        encoded.append(tuple(encode_chat(tokenizer, messages)))
        if not _fits(encoded[-1], engine, max_new_tokens):
            return None
        if number < len(question.turns):
            answer = generate(engine.model, encoded[-1], engine=engine, max_new_tokens=max_new_tokens).tokens
            text: Any = tokenizer.decode(answer, skip_special_tokens=True)
            messages.append({"role": "assistant", "content": text})
    return encoded


def _fits(prompt: Sequence[int], engine: Engine, max_new_tokens: int) -> bool:
    return len(prompt) + max_new_tokens <= engine.model.context_length
