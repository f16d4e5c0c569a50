"""What a search needs before its first trial: the reference run, and what the parts of a step cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from pydantic import ValidationError

from layerskip.decoding.draft_exit import FixedLength
from layerskip.decoding.drafting import SkipDrafter
from layerskip.decoding.loop import generate
from layerskip.stack.model import LayerSkipModel
from layerskip.stack.skipset import SkipSet
from search.assets import AssetMaker, fit_texts
from search.estimate import Estimator
from search.latency import LatencyModel, measure_latency
from search.observer import SearchObserver
from search.predict import Predictor
from search.prompts import EncodedPrompt, PromptSplit
from search.quiet import Quiet
from search.reference import ReferenceRun
from search.settings import SearchSettings
from search.space import SearchSpace
from search.stand_ins import TrainedStandIn
from studies.study import LATENCY_KEY

# Enough that every kernel and buffer has been used once.
_WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class SearchPrompts:
    """Who decodes what.

    Args:
        scored: Drafts are held against the full model's continuations of these.
        fitted: Bridges and vocabularies learn from these; what they learned from would look better than it is.
        measured: Measured candidates decode these, the first of the scored ones.
        held_out: Finalists decode these.
    """

    scored: tuple[EncodedPrompt, ...]
    fitted: tuple[EncodedPrompt, ...]
    measured: tuple[EncodedPrompt, ...]
    held_out: tuple[EncodedPrompt, ...]

    @classmethod
    def of(cls, split: PromptSplit, settings: SearchSettings) -> SearchPrompts:
        """Half of the search's prompts are scored, or as many as are measured; with few prompts all do everything."""
        scored = max((len(split.search) + 1) // 2, settings.prompts_per_trial)
        return cls(
            split.search[:scored],
            split.search[scored:] or split.search,
            split.search[: settings.prompts_per_trial],
            split.held_out[: settings.held_out_prompts],
        )


@dataclass(frozen=True)
class Prepared:
    """What trials work with."""

    makers: AssetMaker
    estimator: Estimator
    latency: LatencyModel
    predictor: Predictor


def prepare(
    model: LayerSkipModel,
    fingerprint: str,
    prompts: SearchPrompts,
    space: SearchSpace,
    settings: SearchSettings,
    study: optuna.Study,
    *,
    stand_ins: Sequence[TrainedStandIn] = (),
    folder: Path,
    quiet: Quiet,
    observer: SearchObserver,
) -> Prepared:
    """Make the reference run and measure the parts of a step, or take those that an earlier search made.

    Args:
        model: The model.
        fingerprint: Of its weights.
        prompts: Who decodes what.
        space: What candidates are made of.
        settings: How long texts are.
        study: Keeps what the parts of a step cost.
        stand_ins: Trained ones that candidates may have.
        folder: Where reference runs are kept.
        quiet: Gives measurements the machine for themselves.
        observer: Told how it goes.

    Raises:
        LayerSkipError: The reference run cannot be kept.
    """
    length = settings.max_new_tokens
    with quiet.beside_others():  # another worker may be measuring
        _warm_up(model, prompts.measured[0])
        run = ReferenceRun(model, folder, fingerprint)
        observer.reference_begins(len(prompts.scored) + len(prompts.fitted))
        makers = AssetMaker(model, fit_texts(run, prompts.fitted, max_new_tokens=length), stand_ins)
        estimator = Estimator(model, run.texts(prompts.scored, max_new_tokens=length))
        observer.reference_ready(run.found)
    latency = _latency(model, space, study, quiet, observer)
    predictor = Predictor(model, space, makers, estimator, latency, max_new_tokens=length)
    return Prepared(makers, estimator, latency, predictor)


def _warm_up(model: LayerSkipModel, prompt: EncodedPrompt) -> None:
    nothing_skipped = SkipDrafter(model, SkipSet(model.num_layers), FixedLength())
    for drafter in (None, nothing_skipped):
        generate(model, prompt.tokens, drafter=drafter, max_new_tokens=_WARM_UP_TOKENS)


def _latency(
    model: LayerSkipModel, space: SearchSpace, study: optuna.Study, quiet: Quiet, observer: SearchObserver
) -> LatencyModel:
    try:
        return LatencyModel.from_json(study.user_attrs[LATENCY_KEY])
    except (KeyError, ValidationError):  # the study is new, or kept another form
        observer.costs_begin()
    with quiet.alone():
        latency = measure_latency(model, space)
    study.set_user_attr(LATENCY_KEY, latency.as_json())
    return latency
