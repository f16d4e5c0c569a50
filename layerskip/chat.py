"""A conversation with a model, which remembers what was said and need not run it again."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from layerskip.drafting.drafter import Drafter
from layerskip.engine import EagerEngine, Engine
from layerskip.errors import InvalidInputError
from layerskip.generation import Generation, Round, stream_rounds
from layerskip.generators import Drained
from layerskip.model import LayerSkipModel
from layerskip.prefix_cache import PrefixCache
from layerskip.sampling import Sampling
from layerskip.tokenizer import StreamingDetokenizer, TextSegment, encode_chat


@dataclass(frozen=True)
class Answer:
    """What a model said to a message.

    Args:
        text: The whole text, without special tokens.
        generation: Its tokens, with counters and times.
        forgotten: Earlier exchanges that had to be left out for this one to fit the context; they stay left out.
    """

    text: str
    generation: Generation
    forgotten: int


class Chat:
    """A conversation with a model.

    Keys and values of what was said are kept, so that a message costs the time of its own tokens, however long the
    conversation is. What the tokenizer makes of an answer's text may differ from the tokens that were generated; from
    there on the text is run again.

    Args:
        model: The model.
        tokenizer: Its tokenizer, with a chat template.
        engine: Runs the model's passes; None is a plain eager one.
        drafter: Proposes tokens to verify; None decodes plainly.
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
        if not tokenizer.chat_template:
            raise InvalidInputError("chat: the model's tokenizer has no chat template, so there are no turns to take")
        self._model = model
        self._tokenizer = tokenizer
        self._engine = engine or EagerEngine(model)  # one for all answers: caches belong to their engine
        self._drafter = drafter
        self._sampling = sampling
        self._max_new_tokens = max_new_tokens
        self._memory = PrefixCache()
        self._history: list[dict[str, str]] = []

    @property
    def history(self) -> tuple[dict[str, str], ...]:
        """What was said so far and not forgotten: messages with ``role`` and ``content``."""
        return tuple(self._history)

    def reset(self) -> None:
        """Forget everything that was said."""
        self._history.clear()
        self._memory.forget()

    def ask(
        self, message: str, *, stop: Callable[[Sequence[int]], bool] | None = None
    ) -> Generator[TextSegment, None, Answer]:
        """Say something to the model, and yield its answer as it comes.

        The oldest exchanges are left out where the conversation and an answer do not fit the model's context. Message
        and answer become part of the conversation when the answer has ended, for whatever reason, and only then.

        Args:
            message: What to say.
            stop: Called with all new tokens after each one; true ends the answer there.

        Raises:
            InvalidInputError: The message alone is longer than the model's context, or the chat template refuses it.
        """
        said = {"role": "user", "content": message}
        kept, ids = self._fitting(said)
        rounds = stream_rounds(
            self._model,
            ids,
            engine=self._engine,
            drafter=self._drafter,
            sampling=self._sampling,
            max_new_tokens=self._max_new_tokens,
            stop=stop,
            memory=self._memory,
        )
        generation = yield from self._pieces(rounds)
        forgotten = (len(self._history) - len(kept)) // 2
        text = str(self._tokenizer.decode(generation.tokens, skip_special_tokens=True))
        self._history = [*kept, said, {"role": "assistant", "content": text}]
        return Answer(text, generation, forgotten)

    def _pieces(self, rounds: Generator[Round, None, Generation]) -> Generator[TextSegment, None, Generation]:
        pieces = StreamingDetokenizer(self._tokenizer)
        certain = Drained(rounds)
        for one in certain:
            for number, token in enumerate(one.tokens):
                yield from pieces.put(token, number < one.accepted)
        yield from pieces.end()
        return certain.returned

    def _fitting(self, said: dict[str, str]) -> tuple[list[dict[str, str]], list[int]]:
        """What is kept of the conversation, and the token ids of it with a new message."""
        context = self._model.context_length
        room = context - min(self._max_new_tokens, context // 2)  # an answer may need half of a short context
        kept = self._history
        ids = encode_chat(self._tokenizer, [*kept, said])
        while kept and len(ids) > room:
            kept = kept[2:]
            ids = encode_chat(self._tokenizer, [*kept, said])
        return kept, ids
