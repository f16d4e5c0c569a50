"""transformers' plain decoding beside layerskip's: what a speedup over our own plain decoding is worth elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from layerskip.engine import Engine
from layerskip.model import LayerSkipModel
from layerskip.packed_linear import PackedLinear
from search.decoding_methods import PLAIN, layerskip_method, transformers_method
from search.machine_lock import MachineLock
from search.measure import MeasuringPlan, measure_methods, summarize
from search.prompts import EncodedPrompt
from studies.comparison import TRANSFORMERS_PLAIN

logger = logging.getLogger(__name__)

# It is a figure for orientation: a few prompts, each decoded twice.
_PROMPTS, _REPEATS = 2, 2


@dataclass(frozen=True)
class TransformersBaseline:
    """transformers' plain decoding on a few prompts, interleaved with ours.

    Args:
        tokens_per_second: Its tokens per second.
        of_ours: Its speed in units of our plain decoding's.
        prompts: How many prompts.
    """

    tokens_per_second: float
    of_ours: float
    prompts: int

    def describe(self, speedup: float) -> str:
        """For people.

        Args:
            speedup: Of a draft over our plain decoding.
        """
        return (
            f"{self.tokens_per_second:.1f} tokens/s in transformers' plain decoding of {self.prompts} of the prompts: "
            f"the draft is {speedup / self.of_ours:.2f}× as fast"
        )


def measure_transformers(
    engine: Engine, prompts: Sequence[EncodedPrompt], max_new_tokens: int, lock: MachineLock
) -> TransformersBaseline | None:
    """Time transformers' plain decoding; None without plain weights, or where it cannot decode.

    Whatever it raises, and Ctrl-C, ends in None: it comes after what was asked for.

    Args:
        engine: Runs our plain decoding.
        prompts: Of which a few are decoded, spread evenly, and no conversations: layerskip keeps their keys and values.
        max_new_tokens: Most tokens for each.
        lock: As in :func:`search.measure.measure_methods`.
    """
    model = engine.model
    if not has_plain_weights(model):
        return None
    theirs = transformers_method(TRANSFORMERS_PLAIN, model)
    single = [prompt for prompt in prompts if not prompt.earlier] or list(prompts)
    few = single[:: max(len(single) // _PROMPTS, 1)][:_PROMPTS]
    methods, plan = [layerskip_method(PLAIN, engine, None), theirs], MeasuringPlan(few, max_new_tokens, _REPEATS)
    try:
        by_prompt = {ours.prompt: other for ours, other in measure_methods(model, methods, plan, lock)}
    except (Exception, KeyboardInterrupt) as error:  # another library's code may fail in any way
        logger.info("transformers' plain decoding was not timed: %s: %s", type(error).__name__, error)
        return None
    summary = summarize(list(by_prompt.values()))
    return TransformersBaseline(summary.draft_tokens_per_second, summary.speedup, len(few))


def has_plain_weights(model: LayerSkipModel) -> bool:
    """Whether transformers runs a model's modules as it has them: no packed weights took the plain ones' place."""
    return not any(isinstance(module, PackedLinear) for module in model.hf_model.modules())
