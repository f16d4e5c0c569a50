"""A conversation with a model, whose earlier messages are not run again."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedTokenizerBase

from layerskip.checks import instance, shown
from layerskip.drafting.drafter import Drafter
from layerskip.engine import EagerEngine, Engine
from layerskip.errors import InvalidInputError
from layerskip.generation import Generation, Round, stream_rounds
from layerskip.model import LayerSkipModel
from layerskip.prefix_cache import PrefixCache
from layerskip.sampling import Sampling
from layerskip.tokenizer import StreamingDetokenizer, TextSegment, encode_chat


@dataclass(frozen=True)
class Answer:
    """A model's answer to a message.

    Args:
        text: The whole text, without special tokens.
        generation: Its tokens, with counters and times.
        forgotten: Earlier exchanges that were left out so that this one fits the context; they stay left out.
    """

    text: str
    generation: Generation
    forgotten: int


class Chat:
    """A conversation with a model.

    Keys and values of earlier messages are kept, so that a message costs the time of its own tokens, however long the
    conversation is. The tokenizer may encode an answer's text differently from the tokens that were generated; from
    there on the text is run again.

    Args:
        model: The model.
        tokenizer: Its tokenizer, with a chat template.
        engine: Runs the model's passes; None is a plain eager one.
        drafter: Proposes tokens to verify; None is plain decoding.
        sampling: How to choose tokens; None is greedy. A seed is used anew for each answer.
        max_new_tokens: Most tokens of one answer.

    Raises:
        InvalidInputError: The tokenizer has no chat template.
    """

    def __init__(
        self,
        model: LayerSkipModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        engine: Engine | None = None,
        drafter: Drafter | None = None,
        sampling: Sampling | None = None,
        max_new_tokens: int = 256,
    ) -> None:
        instance("model", model, LayerSkipModel, "; wrap it: LayerSkipModel(model)")
        if not hasattr(tokenizer, "chat_template"):
            raise InvalidInputError(f"tokenizer: expected the model's, got {shown(tokenizer)}")
        if not tokenizer.chat_template:
            raise InvalidInputError("chat: the model's tokenizer has no chat template, so there are no turns to take")
        self._model = model
        self._tokenizer = tokenizer
        self._engine = engine or EagerEngine(model)  # the same for all answers, because a cache belongs to its engine
        self._drafter = drafter
        self._sampling = sampling
        self._max_new_tokens = max_new_tokens
        self._prompt_cache = PrefixCache()
        self._history: list[dict[str, str]] = []

    @property
    def history(self) -> tuple[dict[str, str], ...]:
        """The messages that are not forgotten, with ``role`` and ``content``."""
        return tuple(self._history)

    def reset(self) -> None:
        """Forget all messages."""
        self._history.clear()
        self._prompt_cache.clear()

    def ask(
        self, message: str, *, stop: Callable[[Sequence[int]], bool] | None = None
    ) -> Generator[TextSegment, None, Answer]:
        """Send the model a message, and yield its answer as it comes.

        The oldest exchanges are left out where the conversation and an answer do not fit the model's context. Message
        and answer become part of the conversation when the answer has ended, for whatever reason, and only then.

        Args:
            message: The message's text.
            stop: Called with all new tokens after each one; true ends the answer there.

        Raises:
            InvalidInputError: The message alone is longer than the model's context, or the chat template refuses it.
        """
        question = {"role": "user", "content": message}
        kept, ids = self._fitting(question)
        rounds = stream_rounds(
            self._model,
            ids,
            engine=self._engine,
            drafter=self._drafter,
            sampling=self._sampling,
            max_new_tokens=self._max_new_tokens,
            stop=stop,
            prompt_cache=self._prompt_cache,
        )
        generation = yield from self._segments(rounds)
        forgotten = (len(self._history) - len(kept)) // 2
        text = str(self._tokenizer.decode(generation.tokens, skip_special_tokens=True))
        self._history = [*kept, question, {"role": "assistant", "content": text}]
        return Answer(text, generation, forgotten)

    def _segments(self, rounds: Generator[Round, None, Generation]) -> Generator[TextSegment, None, Generation]:
        detokenizer = StreamingDetokenizer(self._tokenizer)
        while True:
            try:
                new = next(rounds)
            except StopIteration as end:
                yield from detokenizer.end()
                return cast(Generation, end.value)
            for number, token in enumerate(new.tokens):
                yield from detokenizer.put(token, number < new.accepted)

    def _fitting(self, question: dict[str, str]) -> tuple[list[dict[str, str]], list[int]]:
        """The messages that are kept, and the token ids of the conversation with a new one."""
        context = self._model.context_length
        room = context - min(self._max_new_tokens, context // 2)  # an answer may need half of a short context
        kept = self._history
        ids = encode_chat(self._tokenizer, [*kept, question])
        while kept and len(ids) > room:
            kept = kept[2:]
            ids = encode_chat(self._tokenizer, [*kept, question])
        return kept, ids
