"""Keys and values that outlive a generation, so that a text which continues is not run again from its beginning."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from layerskip.engine import Engine, check_is_engine
from layerskip.kv_cache import KVCache
from layerskip.model_state import ModelState


class PrefixCache:
    """The text of the last generation, with its keys and values.

    Pass the same object to successive generations, and each runs only the part of its prompt that the text before does
    not begin with, even after a generation that was abandoned or that an exception ended. After a change of the model,
    such as of its weights or of its active adapter, it begins anew. Use it with one engine.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the text; the next generation runs its whole prompt."""
        self._cache: KVCache | None = None
        self._state: ModelState | None = None
        self._uses = 0
        self._text: list[int] = []

    def reuse(self, engine: Engine, prompt: Sequence[int], room: int) -> KVCache:
        """A cache for a generation, holding as much of its prompt as the last generations left.

        Args:
            engine: Runs the generation's passes.
            prompt: Token ids.
            room: For so many tokens that follow, a new cache has room at once; it grows with the text.

        Returns:
            The cache. Its length says how much of the prompt need not be run: at most all but the last token, after
            which the first new token is chosen.
        """
        check_is_engine(engine)
        cache, state = self._cache, engine.model.read_state()
        if cache is None or state != self._state or cache.uses != self._uses or not engine.can_continue(cache):
            cache = engine.new_cache(len(prompt) + room)
            self._text = []
        # The last token of a text is in no cache: nothing has followed it yet. An exception may have left even less.
        cache.rollback(min(common_prefix_length(self._text[:-1], prompt[:-1]), cache.length))
        self._state = state
        self._cache, self._uses, self._text = cache, cache.uses, list(prompt)
        return cache

    def append(self, tokens: Sequence[int]) -> None:
        """Note that the text continues with these tokens; the cache holds all of it but the last one."""
        self._text += tokens


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the prefix that two texts have in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
