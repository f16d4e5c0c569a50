"""Who takes part in a comparison: drafts of profiles, copies from the text, and transformers' own modes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from layerskip.decoding.ngrams import FirstTry, NGramDrafter
from layerskip.drafts.assets import DraftAssets
from layerskip.errors import LayerSkipError
from layerskip.identity import identify
from layerskip.profile import DraftProfile
from layerskip.ready_profiles import find_profile, ready_profiles
from layerskip.stack.model import LayerSkipModel
from search.contenders import Contender, own_way, transformers_way

PLAIN, COPIES = "plain decoding", "n-grams alone"
# The published setting of prompt lookup.
_LOOKUP_TOKENS = 10


def own_lineup(model: LayerSkipModel, profiles: Mapping[str, DraftProfile], *, combine: bool) -> list[Contender]:
    """layerskip's ways: plainly, by copying from the text, and with each profile's draft.

    Args:
        model: The model.
        profiles: By the name that each shall have.
        combine: Whether each profile also takes part with copies as a first try, where it has none of its own.

    Raises:
        InvalidProfileError: A profile is for another model.
    """
    taking_part = [
        Contender(PLAIN, own_way(model, None)),
        Contender(COPIES, own_way(model, NGramDrafter())),
    ]
    for name, profile in profiles.items():
        drafts = {name: profile.drafter(model)}
        if combine and profile.ngrams is None:
            drafts[f"{name} + n-grams"] = FirstTry(NGramDrafter(), profile.drafter(model))
        taking_part += [
            Contender(
                called,
                own_way(model, drafter),
                draft_bytes=draft_bytes(model, profile.assets),
                training_seconds=profile.provenance.training_seconds,
            )
            for called, drafter in drafts.items()
        ]
    return taking_part


def transformers_lineup(
    model: LayerSkipModel, profiles: Mapping[str, DraftProfile]
) -> tuple[list[Contender], dict[str, str]]:
    """transformers' ways: plainly, prompt lookup, self-speculation by an early exit, and each profile as an assistant.

    Args:
        model: The model.
        profiles: By the name that each shall have.

    Returns:
        Who takes part, and why others cannot, by name.
    """
    exit_layer = max(model.num_layers // 2, 1)
    ways = {
        "transformers plain": transformers_way(model),
        "transformers prompt lookup": transformers_way(model, prompt_lookup_num_tokens=_LOOKUP_TOKENS),
        f"transformers early exit {exit_layer}": transformers_way(model, assistant_early_exit=exit_layer),
    }
    if model.device.type == "cuda":
        ways["transformers static, compiled"] = transformers_way(model, cache_implementation="static")
    sizes: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for name, profile in profiles.items():
        called = f"transformers assistant ({name})"
        try:
            assistant = profile.as_assistant(model.hf_model)
        except LayerSkipError as error:
            left_out[called] = str(error)
        else:
            ways[called] = transformers_way(model, assistant_model=assistant)
            sizes[called] = draft_bytes(model, replace(profile.assets, token_ids=None))
    contenders = [Contender(name, way, draft_bytes=sizes.get(name, 0), foreign=True) for name, way in ways.items()]
    return contenders, left_out


def draft_bytes(model: LayerSkipModel, assets: DraftAssets) -> int:
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


def ready_for(
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
