"""Decoding methods to measure: layerskip's with each profile's draft, and those of transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from layerskip.drafting.drafter import Drafter
from layerskip.drafting.prompt_lookup import FallbackDrafter, PromptLookupDrafter
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import Engine
from layerskip.errors import LayerSkipError
from layerskip.fingerprint import identify
from layerskip.generation import generate
from layerskip.model import LayerSkipModel
from layerskip.profile import DraftProfile
from layerskip.ready_profiles import find_profile, ready_profiles
from layerskip.utils import PhaseClock


@dataclass(frozen=True)
class Decoded:
    """What decoding one prompt came to.

    Args:
        tokens: The new token ids.
        target_passes: Passes of the target model, the prompt's among them.
        drafted: Places in the text that tokens were proposed for.
        accepted: Proposed tokens that stood.
        draft_seconds: Time spent proposing.
        step_seconds: Time spent in the target model's passes behind the prompt; None where it was not taken.
    """

    tokens: tuple[int, ...]
    target_passes: int
    drafted: int
    accepted: int
    draft_seconds: float
    step_seconds: float | None


@dataclass(frozen=True)
class DecodingMethod:
    """Somebody who decodes.

    Args:
        name: What it is called.
        decode: Continues a prompt by a number of tokens at most.
        draft_bytes: Memory that its draft takes beside the model.
        training_seconds: How long its draft was trained, if that is known.
        foreign: Whether the code is another's, which may refuse this model.
    """

    name: str
    decode: Callable[[Sequence[int], int], Decoded] = field(repr=False)
    draft_bytes: int = 0
    training_seconds: float | None = None
    foreign: bool = False


def layerskip_method(engine: Engine, drafter: Drafter | None) -> Callable[[Sequence[int], int], Decoded]:
    """layerskip's decoding, with a drafter; None decodes plainly."""

    def decode(prompt: Sequence[int], max_new_tokens: int) -> Decoded:
        generation = generate(engine.model, prompt, engine=engine, drafter=drafter, max_new_tokens=max_new_tokens)
        stats = generation.stats
        return Decoded(
            tuple(generation.tokens),
            target_passes=stats.rounds + 1,
            drafted=stats.drafted,
            accepted=stats.accepted,
            draft_seconds=stats.draft_seconds,
            step_seconds=stats.verification_seconds,
        )

    return decode


def transformers_method(model: LayerSkipModel, **options: Any) -> Callable[[Sequence[int], int], Decoded]:
    """``generate`` of transformers.

    Args:
        model: The model.
        options: Of ``generate``, such as ``assistant_model`` or ``prompt_lookup_num_tokens``.
    """
    hf_model: Any = model.hf_model
    eos = sorted(model.eos_token_ids)
    # Greedy and nothing else, whatever the checkpoint recommends: that is what all are compared on.
    greedy = GenerationConfig(do_sample=False, eos_token_id=eos or None, pad_token_id=eos[0] if eos else 0)

    def decode(prompt: Sequence[int], max_new_tokens: int) -> Decoded:
        ids = torch.tensor([list(prompt)], device=model.device)
        tally = _Tally(PhaseClock(model.device))
        with (
            _settings(hf_model, greedy),
            _passes_counted(hf_model, tally),
            _candidates_counted(hf_model, tally),
        ):
            output = hf_model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **options
            )
        return Decoded(
            tuple(output[0, len(prompt) :].tolist()),
            target_passes=tally.target_passes,
            drafted=tally.drafted,
            accepted=tally.accepted,
            draft_seconds=tally.clock.seconds("draft"),
            step_seconds=None,
        )

    return decode


@dataclass
class _Tally:
    """What transformers did, counted while it does it."""

    clock: PhaseClock
    target_passes: int = 0
    drafted: int = 0
    accepted: int = 0


@contextmanager
def _settings(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Let ``generate`` take its defaults from other settings than the model's."""
    before = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = before


@contextmanager
def _passes_counted(model: PreTrainedModel, tally: _Tally) -> Iterator[None]:
    config: Any = model.base_model.config
    depth = config.num_hidden_layers

    def count(module: nn.Module, *_: Any) -> None:
        # An early exit of transformers shortens the model's configuration while it drafts.
        tally.target_passes += config.num_hidden_layers == depth

    handle = model.register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()
        config.num_hidden_layers = depth  # where drafting failed halfway


@contextmanager
def _candidates_counted(model: Any, tally: _Tally) -> Iterator[None]:
    """Count and time what an assisted mode proposes, and count what of it stands."""
    original = model._get_candidate_generator

    def counted(*arguments: Any, **named: Any) -> Any:
        generator = original(*arguments, **named)
        propose, update = generator.get_candidates, generator.update_candidate_strategy

        def get_candidates(input_ids: Tensor, *rest: Any, **more: Any) -> Any:
            with tally.clock.phase("draft"):
                proposed = propose(input_ids, *rest, **more)
            tally.drafted += proposed[0].shape[1] - input_ids.shape[1]
            return proposed

        def update_candidate_strategy(input_ids: Tensor, scores: Tensor, num_matches: int) -> Any:
            tally.accepted += int(num_matches)
            return update(input_ids, scores, num_matches)

        generator.get_candidates, generator.update_candidate_strategy = get_candidates, update_candidate_strategy
        return generator

    model._get_candidate_generator = counted
    try:
        yield
    finally:
        del model._get_candidate_generator


PLAIN, COPIES = "plain decoding", "n-grams alone"
# The published setting of prompt lookup.
_LOOKUP_TOKENS = 10


def layerskip_methods(engine: Engine, profiles: Mapping[str, DraftProfile], *, combine: bool) -> list[DecodingMethod]:
    """layerskip's ways: plainly, by copying from the text, and with each profile's draft.

    Args:
        engine: Runs the passes of the model.
        profiles: By the name that each shall have.
        combine: Whether each profile also takes part with copies as a first try, where it has none of its own.

    Raises:
        InvalidProfileError: A profile is for another model.
    """
    model = engine.model
    taking_part = [
        DecodingMethod(PLAIN, layerskip_method(engine, None)),
        DecodingMethod(COPIES, layerskip_method(engine, PromptLookupDrafter())),
    ]
    for name, profile in profiles.items():
        drafts = {name: profile.drafter(model)}
        if combine and profile.ngrams is None:
            drafts[f"{name} + n-grams"] = FallbackDrafter(PromptLookupDrafter(), profile.drafter(model))
        taking_part += [
            DecodingMethod(
                called,
                layerskip_method(engine, drafter),
                draft_bytes=draft_bytes(model, profile.assets),
                training_seconds=profile.provenance.training_seconds,
            )
            for called, drafter in drafts.items()
        ]
    return taking_part


def transformers_methods(
    model: LayerSkipModel, profiles: Mapping[str, DraftProfile]
) -> tuple[list[DecodingMethod], dict[str, str]]:
    """transformers' ways: plainly, prompt lookup, self-speculation by an early exit, and each profile as an assistant.

    Args:
        model: The model.
        profiles: By the name that each shall have.

    Returns:
        Who takes part, and why others cannot, by name.
    """
    exit_layer = max(model.num_layers // 2, 1)
    ways = {
        "transformers plain": transformers_method(model),
        "transformers prompt lookup": transformers_method(model, prompt_lookup_num_tokens=_LOOKUP_TOKENS),
        f"transformers early exit {exit_layer}": transformers_method(model, assistant_early_exit=exit_layer),
    }
    if model.device.type == "cuda":
        ways["transformers static, compiled"] = transformers_method(model, cache_implementation="static")
    sizes: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for name, profile in profiles.items():
        called = f"transformers assistant ({name})"
        try:
            assistant = profile.as_assistant(model.hf_model)
        except LayerSkipError as error:
            left_out[called] = str(error)
        else:
            ways[called] = transformers_method(model, assistant_model=assistant)
            sizes[called] = draft_bytes(model, replace(profile.assets, token_ids=None))
    contenders = [DecodingMethod(name, way, draft_bytes=sizes.get(name, 0), foreign=True) for name, way in ways.items()]
    return contenders, left_out


def draft_bytes(model: LayerSkipModel, assets: DraftWeights) -> int:
    """Memory of what a draft keeps beside the model: its tensors, and the head's rows for its draft vocabulary.

    Args:
        model: The model, whose dtype the tensors are brought to.
        assets: What the draft needs.
    """
    if not assets:
        return 0
    like = torch.empty(0, dtype=model.dtype)
    rows = 0 if assets.token_ids is None else len(assets.token_ids) * model.config.hidden_size * like.element_size()
    return len(assets.to(like).to_bytes()) + rows


def named(sources: Sequence[str], load: Callable[[str], DraftProfile]) -> dict[str, DraftProfile]:
    """Profiles by the stems of their files, or as they are written where two have the same stem.

    Args:
        sources: Where they come from; one that is named twice counts once.
        load: Loads one.
    """
    different = list(dict.fromkeys(sources))
    taken = Counter([PLAIN, COPIES, *map(_stem, different)])
    return {_stem(source) if taken[_stem(source)] == 1 else source: load(source) for source in different}


def _stem(source: str) -> str:
    path = Path(source)
    return path.stem if path.suffix == ".json" else path.name


def ready_profiles_for(
    model: LayerSkipModel, given: Iterable[DraftProfile], *, device: str, dtype: str
) -> dict[str, DraftProfile]:
    """Ready profiles of a model, by name, except those that were given anyway.

    Args:
        model: The model.
        given: What takes part already.
        device: As in :func:`layerskip.ready_profiles.find_profile`.
        dtype: Likewise.
    """
    mine = identify(model).fingerprint
    names = sorted({entry.name for entry in ready_profiles() if entry.fingerprint == mine})
    found = {name: DraftProfile.load(find_profile(name, device=device, dtype=dtype)) for name in names}
    known = list(given)
    return {f"ready {name}": profile for name, profile in found.items() if profile not in known}
