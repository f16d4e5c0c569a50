"""What takes the place of CUDA graphs where there is no device to capture them on."""

import weakref
from dataclasses import fields, is_dataclass, replace

from benchmarks.cuda.bench import RunsAnew


class Counting(RunsAnew):
    """Runs the pass anew each time, and counts the passes that it was given.

    Attributes:
        captured: How many.
    """

    captured = 0

    def __call__(self, run):
        self.captured += 1
        return run


class LikeAGraph(RunsAnew):
    """What a captured graph does: it ran once before, and each replay writes its outputs where the last one did."""

    def __call__(self, run):
        outputs = tensors_of(run())

        def replay():
            new = run()
            for kept, tensor in zip(outputs, tensors_of(new), strict=True):
                kept.copy_(tensor)
            if not is_dataclass(new):
                return outputs[0]
            names = [field.name for field in fields(new) if getattr(new, field.name) is not None]
            return replace(new, **dict(zip(names, outputs, strict=True)))

        return replay


class LikeAPool(LikeAGraph):
    """Also fails as the allocator does: a pool whose graphs were all dropped cannot be captured into again.

    Attributes:
        live: How many graphs of the pool there are.
        pools: How many pools were made.
    """

    def __init__(self):
        self.live, self.used, self.pools = 0, False, 1

    def __call__(self, run):
        if self.used and not self.live:
            raise AssertionError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        replay = super().__call__(run)
        self.live, self.used, pool = self.live + 1, True, self.pools

        def drop():
            if pool == self.pools:
                self.live -= 1

        weakref.finalize(replay, drop)
        return replay

    def renew(self):
        self.live, self.used, self.pools = 0, False, self.pools + 1


class LikeAddresses(LikeAGraph):
    """Also fails where a graph would touch freed memory: if the cache lies elsewhere than when the pass was captured.

    Attributes:
        engine: Whose cache it watches; to be set.
    """

    engine = None

    def __call__(self, run):
        replay, address = super().__call__(run), self.engine._cache._store_address

        def checked():
            assert self.engine._cache._store_address == address, (
                "the pass knows an address that is no longer the cache's"
            )
            return replay()

        return checked


call_directly, like_a_graph = RunsAnew(), LikeAGraph()


def tensors_of(outputs):
    """The tensors of what a pass gives, in the order of its fields."""
    values = [getattr(outputs, field.name) for field in fields(outputs)] if is_dataclass(outputs) else [outputs]
    return [value for value in values if value is not None]
