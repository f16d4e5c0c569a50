"""Decoding candidates for real, with every prompt's measurement recorded as it comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from layerskip.drafting.config import DraftConfig
from layerskip.model import LayerSkipModel
from layerskip.profile import PromptSet
from search.builder import DraftBuilder
from search.callbacks import SearchObserver
from search.machine_lock import MachineLock
from search.measure import PromptMeasurement, measure_prompt, warm_up
from search.prompts import EncodedPrompt
from studies.records import MeasurementRecord, Records


class Measurer:
    """Decodes candidates, paired with plain decoding.

    Attributes:
        quiet: Turns with other workers; who asks for measurements takes one.

    Args:
        model: The model.
        makers: Makes drafts' bridges and vocabularies.
        records: Where measurements are kept.
        study: Name of the study that they belong to.
        max_new_tokens: Most tokens for each prompt.
        quiet: Gives measurements the device for themselves.
        observer: Told how it goes.
    """

    def __init__(
        self,
        model: LayerSkipModel,
        makers: DraftBuilder,
        records: Records,
        study: str,
        *,
        max_new_tokens: int,
        quiet: MachineLock,
        observer: SearchObserver,
    ) -> None:
        self._model = model
        self._makers = makers
        self._records = records
        self._study = study
        self._limit = max_new_tokens
        self.quiet = quiet
        self._observer = observer

    def measurements(
        self,
        trial: int,
        config: DraftConfig,
        prompts: Sequence[EncodedPrompt],
        prompt_set: PromptSet,
    ) -> Iterator[PromptMeasurement]:
        """Decode prompts one after the other, each both ways.

        Args:
            trial: Number of the trial whose candidate it is.
            config: How to draft.
            prompts: What to decode.
            prompt_set: What they are, for the record.

        Raises:
            LosslessnessError: The draft changed the output.
        """
        self._observer.measurement_begins(trial)
        drafter = self._makers.drafter(config)
        warm_up(self._model, drafter, prompts, max_new_tokens=self._limit)
        for number, prompt in enumerate(prompts, start=1):
            plain_first = number % 2 == 1
            one = measure_prompt(self._model, prompt, drafter, max_new_tokens=self._limit, plain_first=plain_first)
            self._records.add(MeasurementRecord(study=self._study, trial=trial, prompt_set=prompt_set, **asdict(one)))
            self._observer.prompt_measured(number, len(prompts))
            yield one
