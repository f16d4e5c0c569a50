"""Self-speculative decoding inside ``model.generate`` of transformers."""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from layerskip.adapters import check_generating
from layerskip.drafting.drafter import Drafter
from layerskip.engine import EagerEngine, Engine, GraphEngine, PackedEngine, on_one_cuda_device
from layerskip.errors import InvalidInputError
from layerskip.generation import DecodingStats, Generation, generate
from layerskip.hub import load_profile
from layerskip.kv_cache import CACHE_NAMES
from layerskip.logits_processing import GenerationHistory, ProcessorSampling
from layerskip.model import LayerSkipModel
from layerskip.model_state import ModelState
from layerskip.names import AUTO
from layerskip.profile import DraftProfile

EngineName = Literal["auto", "eager", "packed", "cuda-graphs"]

# Drafters kept for each model, those used last: each may hold rows of the head.
_DRAFTERS_KEPT = 4


@dataclass
class _Wrapped:
    """The engine of a model's wrapper, the state that the model was wrapped in, and its drafters, the newest last.

    Attributes:
        busy: Held by the generation that runs on an engine which can run one at a time.
    """

    engine: Engine
    state: ModelState
    drafters: list[tuple[DraftProfile, Drafter]] = field(default_factory=list)
    busy: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def engine_for_a_generation(self) -> Iterator[Engine]:
        """The engine, or an eager one while another thread's generation has the cache of captured passes."""
        if not isinstance(self.engine, GraphEngine):
            yield self.engine
        elif self.busy.acquire(blocking=False):
            try:
                yield self.engine
            finally:
                self.busy.release()
        else:
            yield EagerEngine(self.engine.model)


_WRAPPED: weakref.WeakKeyDictionary[PreTrainedModel, dict[EngineName, _Wrapped]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def _wrapped_and_drafter(profile: DraftProfile, model: PreTrainedModel, engine: EngineName) -> tuple[_Wrapped, Drafter]:
    """The engine of a model, and a drafter for one generation with it.

    The engine is the same for every call until the model is moved, changed or dropped; until then a profile is checked,
    and its stack built, once. The engine does not keep the model alive; keep the model for as long as you use it.

    Raises:
        InvalidProfileError: The profile is for another model.
        UnsupportedModelError: The model cannot be split into sublayers.
        InvalidInputError: The model is in training mode, or the engine cannot run it.
    """
    with _LOCK:
        wrapped = _wrapped(model, engine)
        known = next((entry for entry in wrapped.drafters if entry[0] == profile), None)
        newest = known or (profile, profile.drafter(wrapped.engine.model))
        wrapped.drafters = [*(entry for entry in wrapped.drafters if entry is not known), newest][-_DRAFTERS_KEPT:]
        # A copy with a state of its own, for generations at the same time.
        return wrapped, copy.copy(newest[1])


def _wrapped(model: PreTrainedModel, engine: EngineName) -> _Wrapped:
    if model.training:
        raise InvalidInputError("the model is in training mode; call model.eval() first")
    by_engine = _WRAPPED.setdefault(model, {})
    wrapped = by_engine.get(engine)
    if wrapped is None or wrapped.state != wrapped.engine.model.read_state():
        # A proxy, because a value that refers to its key keeps it alive.
        wrapper = LayerSkipModel(cast(PreTrainedModel, weakref.proxy(model)))
        runner = _engine(wrapper, engine)
        wrapped = by_engine[engine] = _Wrapped(runner, wrapper.read_state())
    return wrapped


def _engine(model: LayerSkipModel, name: EngineName) -> Engine:
    if name == GraphEngine.name or (name == AUTO and on_one_cuda_device(model)):
        return GraphEngine(model)
    return PackedEngine(model) if name == PackedEngine.name else EagerEngine(model)


# Prepared by generate() for the model's own forward; layerskip computes positions, masks and cache itself.
_PREPARED = frozenset({"attention_mask", "position_ids", *CACHE_NAMES, "use_cache", "logits_to_keep"})


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """The output of ``generate`` with ``return_dict_in_generate=True``: transformers' own, and counters.

    The cache is None: layerskip keeps a cache of its own kind for the generation.

    Args:
        stats: Tokens drafted and accepted, and times.
    """

    stats: DecodingStats | None = None


def speculate(
    profile: DraftProfile | str | Path,
    *,
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    engine: EngineName = "auto",
) -> Speculation:
    """Let ``generate`` decode self-speculatively: ``model.generate(**inputs, custom_generate=speculate(profile))``.

    The output is that of ``generate`` without it: the same tokens when greedy (in float32), samples of the same
    distribution with ``do_sample=True``. Generation config, logits processors, stopping criteria and
    ``return_dict_in_generate`` with ``output_scores`` and ``output_logits`` work as they do there. The model is not
    changed. Checking the profile and building the draft, which take time, happen in the first call with a model.

    ``generate`` does not hand its streamer and its tokenizer to a callable, so give them here.

    Args:
        profile: A profile, or what :func:`layerskip.load_profile` takes: its file, the name of a ready one, or a
            repository on the Hub.
        streamer: Gets the prompt, then each token as it is generated. Give it here *instead of* to ``generate``.
        tokenizer: Needed only with ``generate(stop_strings=...)``.
        engine: ``eager``; ``cuda-graphs``, which ``auto`` takes for a model on one CUDA device, and ``eager`` for
            others; ``packed`` copies the weights once into the layout that oneDNN's kernels read fastest, on a CPU: as
            much memory again.

    Raises:
        InvalidProfileError: There is no such profile, or it is not valid.
        HubError: The repository cannot be downloaded.
    """
    if not isinstance(profile, DraftProfile):
        profile = load_profile(profile)
    return Speculation(profile, streamer, tokenizer, engine)


@dataclass(frozen=True)
class Speculation:
    """A decoding method for ``generate(custom_generate=...)``; :func:`speculate` makes one.

    Attributes:
        profile: How to draft, whether or not it was measured to be faster than plain decoding.
        streamer: As in :func:`speculate`.
        tokenizer: As in :func:`speculate`.
        engine: As in :func:`speculate`.
    """

    profile: DraftProfile
    streamer: BaseStreamer | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    engine: EngineName = "auto"

    def prepare(self, model: PreTrainedModel) -> Engine:
        """Check the profile and build the draft now, instead of in the first generation with a model.

        Returns:
            The engine that runs generations with this model, such as to give it its costs. It does not keep the model
            alive.

        Raises:
            InvalidProfileError: The profile is for another model.
            UnsupportedModelError: The model cannot be split into sublayers.
            InvalidInputError: The model is in training mode, or the engine cannot run it.
        """
        return _wrapped_and_drafter(self.profile, model, self.engine)[0].engine

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        stop_strings: str | Sequence[str] | None = None,
        **model_kwargs: Any,
    ) -> Tensor | SpeculativeOutput:
        """Decode; ``generate`` calls this.

        Args:
            model: The model whose ``generate`` it is.
            input_ids: ``[1, n]``, the prompt.
            logits_processor: The generation config's and the caller's.
            stopping_criteria: Likewise.
            generation_config: The settings.
            stop_strings: ``generate``'s argument; reaches a callable because it is named here.
            model_kwargs: Arguments for the model's forward; only those that ``generate`` prepares itself are allowed.

        Returns:
            ``[1, n + m]``, prompt and new tokens, or the output that ``return_dict_in_generate`` asks for.

        Raises:
            InvalidInputError: A setting or an input is not supported. The message names it.
            InvalidProfileError: The profile is for another model.
            UnsupportedModelError: The model cannot be split into sublayers, or generates with an adapter that
                does more than to replace modules.
        """
        _check_settings(generation_config)
        check_generating(model)
        wrapped, drafter = _wrapped_and_drafter(self.profile, model, self.engine)
        wrapper = wrapped.engine.model
        _check_inputs(input_ids, model_kwargs)
        criteria = StoppingCriteriaList([*stopping_criteria, *self._stop_string_criteria(stop_strings)])
        history = GenerationHistory(
            input_ids,
            criteria,
            keep_scores=bool(generation_config.return_dict_in_generate and generation_config.output_scores),
            keep_logits=bool(generation_config.return_dict_in_generate and generation_config.output_logits),
        )
        sampling = ProcessorSampling(history, logits_processor, bool(generation_config.do_sample), wrapper.vocab_size)
        simple = not sampling.needs_history and all(type(criterion) in _KNOWN_TO_THE_LOOP for criterion in criteria)
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        with wrapped.engine_for_a_generation() as engine:
            generation = generate(
                wrapper,
                input_ids,
                engine=engine,
                drafter=drafter,
                sampling=sampling,
                max_new_tokens=_max_new_tokens(criteria, input_ids, wrapper),
                eos_token_ids=_eos_token_ids(criteria) if simple else (),
                stop=None if simple else history.ends_after,
                on_token=None if self.streamer is None else self._put,
            )
        if self.streamer is not None:
            self.streamer.end()
        _warn_if_full(generation, wrapper)
        return _output(generation, input_ids, history, generation_config)

    def _stop_string_criteria(self, stop_strings: str | Sequence[str] | None) -> list[StopStringCriteria]:
        if stop_strings is None:
            return []
        if self.tokenizer is None:
            raise InvalidInputError(
                "stop_strings: generate does not hand its tokenizer to a callable; "
                "give it to layerskip.speculate(profile, tokenizer=tokenizer)"
            )
        strings = stop_strings if isinstance(stop_strings, str) else list(stop_strings)
        return [StopStringCriteria(self.tokenizer, strings)]

    def _put(self, token: int) -> None:
        assert self.streamer is not None
        self.streamer.put(torch.tensor([token]))


# Criteria that decoding decides itself, without reading from the device.
_KNOWN_TO_THE_LOOP = frozenset({EosTokenCriteria, MaxLengthCriteria})


def _check_settings(config: GenerationConfig) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise InvalidInputError(
            f"generation mode '{mode.value.replace('_', ' ')}': layerskip decodes greedily or by sampling only; "
            "leave out the setting that asks for it, or custom_generate"
        )
    if (config.num_return_sequences or 1) > 1:
        raise InvalidInputError(
            f"num_return_sequences: layerskip decodes one text at a time, got {config.num_return_sequences}; "
            "call generate as often"
        )
    for name in ("output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, name):
            raise InvalidInputError(
                f"{name}: not available with layerskip, whose passes take several tokens at once; "
                "leave it out, or run the model once more on the finished text"
            )


def _check_inputs(input_ids: Tensor, model_kwargs: dict[str, Any]) -> None:
    if len(input_ids) != 1:
        raise InvalidInputError(
            f"input_ids: layerskip decodes one prompt at a time, got a batch of {len(input_ids)}; "
            "call generate for each"
        )
    for name, value in model_kwargs.items():
        if value is not None and name not in _PREPARED:
            raise InvalidInputError(f"{name}: layerskip takes token ids only; leave it out")
    mask = model_kwargs.get("attention_mask")  # None if it is all ones
    if mask is not None:
        raise InvalidInputError(
            "attention_mask: hides some of the prompt, such as padding; give the prompt alone, "
            "and an attention_mask of ones if it contains the padding token"
        )
    positions = model_kwargs.get("position_ids")
    expected = torch.arange(input_ids.shape[1])
    if positions is not None and not torch.equal(positions.cpu(), expected[None]):
        raise InvalidInputError("position_ids: layerskip counts positions from 0 without gaps; leave them out")
    for name in CACHE_NAMES:
        cache = model_kwargs.get(name)
        if cache is not None and (getattr(cache, "_is_user_defined", False) or cache.get_seq_length()):
            raise InvalidInputError(f"{name}: layerskip keeps a cache of its own; leave it out")


def _max_new_tokens(criteria: StoppingCriteriaList, input_ids: Tensor, model: LayerSkipModel) -> int:
    """At least one, as in generate; criteria that set no limit leave the model's context."""
    longest = [criterion.max_length for criterion in criteria if isinstance(criterion, MaxLengthCriteria)]
    return max(min(longest, default=model.context_length + 1) - input_ids.shape[1], 1)


def _eos_token_ids(criteria: StoppingCriteriaList) -> set[int]:
    ending = [criterion for criterion in criteria if isinstance(criterion, EosTokenCriteria)]
    return {int(id) for criterion in ending for id in criterion.eos_token_id}


def _warn_if_full(generation: Generation, model: LayerSkipModel) -> None:
    if generation.finish_reason == "context":
        warnings.warn(
            f"the text ends after {len(generation.tokens)} new tokens because the model's context of "
            f"{model.context_length} is full; generate by itself would continue beyond it",
            stacklevel=_level_of_caller(),
        )


# Packages whose frames are between our caller and us.
_PASSED_THROUGH = ("layerskip", "transformers", "torch")


def _level_of_caller() -> int:
    """The stack level of who called ``generate``, for a warning that the caller of this function gives.

    How many frames of transformers and torch are in between depends on their versions.
    """
    level, frame = 0, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_THROUGH:
        level, frame = level + 1, frame.f_back
    return level


def _output(
    generation: Generation, input_ids: Tensor, history: GenerationHistory, config: GenerationConfig
) -> Tensor | SpeculativeOutput:
    new = torch.tensor([generation.tokens], dtype=input_ids.dtype, device=input_ids.device)
    sequences = torch.cat([input_ids, new], dim=-1)
    if not config.return_dict_in_generate:
        return sequences
    return SpeculativeOutput(
        sequences=sequences,  # type: ignore[arg-type]
        scores=history.scores,  # type: ignore[arg-type]
        logits=history.logits,  # type: ignore[arg-type]
        stats=generation.stats,
    )
