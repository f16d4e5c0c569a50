"""Keys and values that outlive a generation, so that a text which goes on is not run again from its beginning."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from layerskip.engine import Engine
from layerskip.kv_cache import KVCache


class PrefixCache:
    """The text of the last generation, and the keys and values of it.

    Give the same one to one generation after the other, and each runs only what its prompt does not have in common with
    the beginning of the text before, also after a generation that was left or that an exception ended. Use it with one
    model and engine.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forget the text; the next generation runs its whole prompt."""
        self._cache: KVCache | None = None
        self._uses = 0
        self._text: list[int] = []

    def begin(self, engine: Engine, prompt: Sequence[int], limit: int) -> KVCache:
        """A cache for a generation, holding as much of its prompt as the last generations left.

        Args:
            engine: Runs the generation's passes.
            prompt: Token ids.
            limit: Most tokens that follow.

        Returns:
            The cache. Its length says how much of the prompt need not be run: at most all but the last token, behind
            which the first new one is chosen.
        """
        needed = len(prompt) + limit
        cache = self._cache
        if cache is None or cache.uses != self._uses or not engine.has_room(cache, needed):
            cache = engine.new_cache(needed)
            self._text = []
        # The last token of a text is in no cache: nothing has followed it yet. An exception may have left even less.
        cache.rollback(min(_common(self._text[:-1], prompt[:-1]), cache.length))
        self._cache, self._uses, self._text = cache, cache.uses, list(prompt)
        return cache

    def append(self, tokens: Sequence[int]) -> None:
        """The text goes on with these tokens; the cache holds all of it but the last one."""
        self._text += tokens


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the beginning that two texts have in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
