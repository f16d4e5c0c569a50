"""transformers' plain decoding beside layerskip's: what a speedup over our own plain decoding is worth elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerskip.engine import Engine
from layerskip.model import LayerSkipModel
from layerskip.packed_linear import PackedLinear
from search.compare import usable_methods
from search.decoding_methods import PLAIN, layerskip_method, transformers_method
from search.machine_lock import MachineLock
from search.measure import MeasuringPlan, measure_methods, summarize
from search.prompts import EncodedPrompt
from studies.comparison import TRANSFORMERS_PLAIN

# It is a figure for orientation: a few prompts, each decoded twice.
_PROMPTS, _REPEATS = 2, 2


@dataclass(frozen=True)
class TransformersBaseline:
    """transformers' plain decoding on a few prompts, interleaved with ours.

    Args:
        tokens_per_second: Its tokens per second.
        of_ours: Its speed in units of our plain decoding's.
    """

    tokens_per_second: float
    of_ours: float

    def describe(self, speedup: float) -> str:
        """For people.

        Args:
            speedup: Of a draft over our plain decoding.
        """
        return (
            f"{self.tokens_per_second:.1f} tokens/s in transformers' plain decoding: "
            f"the draft is {speedup / self.of_ours:.2f}× of that"
        )


def measure_transformers(
    engine: Engine, prompts: Sequence[EncodedPrompt], max_new_tokens: int, lock: MachineLock
) -> TransformersBaseline | None:
    """Time transformers' plain decoding; None where packed weights took the plain ones' place, or it cannot decode.

    Args:
        engine: Runs our plain decoding.
        prompts: Of which the first few are decoded.
        max_new_tokens: Most tokens for each.
        lock: As in :func:`search.measure.measure_methods`.
    """
    model = engine.model
    if _is_packed(model):
        return None
    theirs = transformers_method(TRANSFORMERS_PLAIN, model)
    usable, _ = usable_methods([layerskip_method(PLAIN, engine, None), theirs], prompts[0])
    if len(usable) < 2:
        return None
    plan = MeasuringPlan(prompts[:_PROMPTS], max_new_tokens, _REPEATS)
    by_prompt = {ours.prompt: other for ours, other in measure_methods(model, usable, plan, lock)}
    summary = summarize(list(by_prompt.values()))
    return TransformersBaseline(summary.draft_tokens_per_second, summary.speedup)


def _is_packed(model: LayerSkipModel) -> bool:
    return any(isinstance(module, PackedLinear) for module in model.hf_model.modules())
