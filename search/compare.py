"""Compare ways to decode one model: which methods take part, and the figures of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from layerskip.drafting.prompt_lookup import PromptLookupDrafter
from layerskip.engine import Engine
from layerskip.errors import LayerSkipError
from layerskip.fingerprint import identify
from layerskip.model import LayerSkipModel
from layerskip.profile import DraftProfile
from layerskip.ready_profiles import find_profile, ready_profiles
from search.decoding_methods import PLAIN, DecodingMethod, layerskip_method, transformers_method
from search.machine_lock import MachineLock
from search.measure import WARM_UP_TOKENS, Measurement, MeasuringPlan, draft_bytes, measure_methods
from search.prompts import EncodedPrompt
from studies.comparison import TRANSFORMERS_PLAIN, Entry
from studies.statistics import speedup_of_all

LOOKUP = "prompt lookup"
# The published setting of prompt lookup.
_LOOKUP_TOKENS = 10


def layerskip_methods(engine: Engine, profiles: Mapping[str, DraftProfile], *, combine: bool) -> list[DecodingMethod]:
    """layerskip's methods: plain decoding, which is the first, prompt lookup, and each profile's draft.

    Args:
        engine: Runs the passes of the model.
        profiles: By the name that each method shall have.
        combine: Whether each profile without prompt lookup of its own also takes part with it.

    Raises:
        InvalidProfileError: A profile is for another model.
    """
    model = engine.model
    methods = [layerskip_method(PLAIN, engine, None), layerskip_method(LOOKUP, engine, PromptLookupDrafter())]
    for name, profile in profiles.items():
        drafters = {name: profile.drafter(model)}
        if combine and profile.prompt_lookup is None:
            own = profile.drafter(model)
            drafters[f"{name} + {LOOKUP}"] = PromptLookupDrafter(drafter=own, costs=profile.costs)
        size = draft_bytes(model, profile.config, profile.weights(model))
        training_seconds = profile.provenance.training_seconds
        methods += [
            layerskip_method(title, engine, drafter, draft_bytes=size, training_seconds=training_seconds)
            for title, drafter in drafters.items()
        ]
    return methods


def transformers_methods(
    model: LayerSkipModel, profiles: Mapping[str, DraftProfile]
) -> tuple[list[DecodingMethod], dict[str, str]]:
    """transformers' methods: plain, prompt lookup, early exit, on CUDA a static cache, each profile as an assistant.

    Args:
        model: The model.
        profiles: By the name that each method shall have.

    Returns:
        The methods, and why profiles cannot be assistants, by the name of the method.
    """
    exit_layer = max(model.num_layers // 2, 1)
    methods = [
        transformers_method(TRANSFORMERS_PLAIN, model),
        transformers_method("transformers prompt lookup", model, prompt_lookup_num_tokens=_LOOKUP_TOKENS),
        transformers_method(f"transformers early exit {exit_layer}", model, assistant_early_exit=exit_layer),
    ]
    if model.device.type == "cuda":
        methods.append(transformers_method("transformers static, compiled", model, cache_implementation="static"))
    left_out: dict[str, str] = {}
    for profile_name, profile in profiles.items():
        name = f"transformers assistant ({profile_name})"
        try:
            assistant = profile.as_assistant(model.hf_model)
        except LayerSkipError as error:
            left_out[name] = str(error)
        else:
            weights = profile.weights(model)
            weights.token_ids = None  # generate scores every token
            size = draft_bytes(model, profile.config, weights)
            methods.append(transformers_method(name, model, draft_bytes=size, assistant_model=assistant))
    return methods, left_out


def named_profiles(sources: Sequence[str], load: Callable[[str], DraftProfile]) -> dict[str, DraftProfile]:
    """Profiles by the stems of their files, or by their whole sources where two have the same stem.

    Args:
        sources: Where they come from; a repeated source counts once.
        load: Loads a profile.
    """
    distinct = list(dict.fromkeys(sources))
    stems = Counter([PLAIN, LOOKUP, *map(_stem, distinct)])
    return {_stem(source) if stems[_stem(source)] == 1 else source: load(source) for source in distinct}


def _stem(source: str) -> str:
    path = Path(source)
    return path.stem if path.suffix == ".json" else path.name


def ready_profiles_for(
    model: LayerSkipModel, known: Iterable[DraftProfile], *, device: str, dtype: str
) -> dict[str, DraftProfile]:
    """Ready profiles of a model, by name, except known ones.

    Args:
        model: The model.
        known: Profiles that take part already.
        device: As in :func:`layerskip.ready_profiles.find_profile`.
        dtype: Likewise.
    """
    fingerprint, known = identify(model).fingerprint, list(known)
    names = sorted({entry.name for entry in ready_profiles() if entry.fingerprint == fingerprint})
    found = {name: DraftProfile.load(find_profile(name, device=device, dtype=dtype)) for name in names}
    return {f"ready {name}": profile for name, profile in found.items() if profile not in known}


def usable_methods(
    methods: Sequence[DecodingMethod], prompt: EncodedPrompt
) -> tuple[Sequence[DecodingMethod], dict[str, str]]:
    """The methods that can decode at all, and why the others cannot, by name.

    Args:
        methods: The methods to try. An error of layerskip's own is raised.
        prompt: The prompt to try them with.
    """
    reasons: dict[str, str] = {}
    for method in methods:
        try:
            method.decode_turns(prompt, WARM_UP_TOKENS)
        except Exception as error:  # another library's code may fail in any way
            if not method.third_party:
                raise
            reasons[method.name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
    return [method for method in methods if method.name not in reasons], reasons


def compare(
    model: LayerSkipModel,
    methods: Sequence[DecodingMethod],
    plan: MeasuringPlan,
    lock: MachineLock,
    on_prompt: Callable[[int], None],
) -> list[Entry]:
    """Measure methods on the same prompts, interleaved.

    Args:
        model: The model.
        methods: The methods; the first is layerskip's plain decoding.
        plan: What to decode, and how often.
        lock: As in :func:`search.measure.measure_methods`.
        on_prompt: Called with the number of prompts decoded by all methods so far, repeats included.

    Returns:
        The figures of each method, in their order.
    """
    by_prompt: dict[str, Sequence[Measurement]] = {}
    for done, measurements in enumerate(measure_methods(model, methods, plan, lock), start=1):
        by_prompt[measurements[0].prompt] = measurements
        on_prompt(done)
    by_method = zip(*by_prompt.values(), strict=True)
    return [
        _entry(method, measurements, _peak_bytes(model, method, plan))
        for method, measurements in zip(methods, by_method, strict=True)
    ]


def _peak_bytes(model: LayerSkipModel, method: DecodingMethod, plan: MeasuringPlan) -> int | None:
    """Most device memory in use while the longest prompt is decoded, above what was in use before; None off CUDA."""
    if model.device.type != "cuda":
        return None
    longest = max(plan.prompts, key=lambda prompt: len(prompt.tokens))
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    method.decode_turns(longest, plan.max_new_tokens)
    return torch.cuda.max_memory_allocated(model.device) - before


def _entry(method: DecodingMethod, measurements: Sequence[Measurement], peak_bytes: int | None) -> Entry:
    runs = [run for measurement in measurements for run in measurement.draft]
    drafted = sum(run.decoded.drafted for run in runs)
    draft_seconds = sum(run.decoded.draft_seconds for run in runs)
    step = _plain_step(measurements)
    rates = _rates(measurements)
    return Entry(
        name=method.name,
        tokens_per_second=sum(m.draft_tokens for m in measurements) / sum(m.draft_seconds for m in measurements),
        lowest=min(rates),
        highest=max(rates),
        speedup=speedup_of_all(measurements),
        prompts=measurements,
        acceptance_rate=sum(run.decoded.accepted for run in runs) / drafted if drafted else None,
        tokens_per_pass=sum(len(run.decoded.tokens) for run in runs) / sum(run.decoded.target_passes for run in runs),
        draft_cost=draft_seconds / drafted / step if drafted and step else None,
        draft_share=draft_seconds / sum(run.seconds for run in runs),
        draft_bytes=method.draft_bytes,
        peak_bytes=peak_bytes,
        training_seconds=method.training_seconds,
        near_ties=sum(measurement.near_tie for measurement in measurements),
        different=sum(measurement.error is not None for measurement in measurements),
        disturbed=sum(measurement.disturbed for measurement in measurements),
    )


def _rates(measurements: Sequence[Measurement]) -> list[float]:
    """Tokens per second over all prompts, of each repeat; of those that only some prompts had, none."""
    return [
        sum(len(run.decoded.tokens) for run in repeat) / sum(run.seconds for run in repeat)
        for repeat in zip(*(measurement.draft for measurement in measurements), strict=False)
    ]


def _plain_step(measurements: Sequence[Measurement]) -> float | None:
    """Seconds of one step of plain decoding; None if there was none after the prompts."""
    runs = [run for measurement in measurements for run in measurement.plain]
    steps = sum(run.decoded.steps for run in runs)
    return sum(run.decoded.step_seconds or 0.0 for run in runs) / steps if steps else None
