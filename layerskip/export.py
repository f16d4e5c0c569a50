"""A draft as a checkpoint of its own, for engines that take a separate draft model."""

from __future__ import annotations

import json
import secrets
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from layerskip.checks import instance
from layerskip.draft_model import draft_model_of, kept_layers
from layerskip.drafting.stopping import DraftStopping
from layerskip.drafting.weights import DraftWeights
from layerskip.errors import ExportError, InvalidInputError
from layerskip.families import family_of
from layerskip.hub import CARD_NAME, card_metadata, measured_in_words, with_hub_name
from layerskip.model import LayerSkipModel
from layerskip.profile import DraftProfile
from layerskip.sublayers import Stack


def export_card(profile: DraftProfile, draft: PreTrainedConfig, full: PreTrainedConfig) -> str:
    """The README, in Markdown with YAML metadata.

    Args:
        profile: The exported profile.
        draft: Configuration of the exported checkpoint.
        full: Configuration of the target model.
    """
    sections = [
        f"---\n{card_metadata(profile.base_model_name_or_path, library='transformers')}\n---",
        f"# A draft of {_target(profile)}",
        _what(profile),
        *_half_kept(profile),
        *_left_out(profile),
        *_irregular(draft, full),
        measured_in_words(profile.measured),
        "layerskip's own draft shares weights, keys and values with the model. Engines keep them twice and have other "
        "costs, so figures of layerskip are not theirs: measure there.",
        "## Use",
        _usage(profile),
    ]
    return "\n\n".join(sections) + "\n"


def _target(profile: DraftProfile) -> str:
    return profile.base_model_name_or_path or profile.model.id


def _what(profile: DraftProfile) -> str:
    layers, skip_set = kept_layers(profile.skip_set), profile.skip_set
    return (
        f"A draft model for speculative decoding of {_target(profile)}, and of no use alone: {len(layers)} of its "
        f"{skip_set.num_layers} layers ({', '.join(map(str, layers))}), with their weights unchanged"
        f"{_trained(profile)}. Skipped: {skip_set}. Written by layerskip; it is an ordinary checkpoint."
    )


def _trained(profile: DraftProfile) -> str:
    number = 0 if profile.tensors is None else profile.tensors.layers
    return f", and {number} trained layer{'s' * (number > 1)} in place of some that are skipped" if number else ""


def _half_kept(profile: DraftProfile) -> list[str]:
    kept = profile.skip_set.kept
    zeroed = 2 * len(kept_layers(profile.skip_set)) - len(kept)
    if not zeroed:
        return []
    return [
        f"In {zeroed} of these layers one sublayer is skipped: its output projection is zero. Engines compute it all "
        "the same, so such a layer costs them as much as a whole one."
    ]


def _left_out(profile: DraftProfile) -> list[str]:
    tensors, parts = profile.tensors, []
    if tensors is not None and tensors.bridges:
        parts.append(
            f"The profile's bridges ({tensors.bridges}) are not in it: no layer of this architecture can be a linear "
            "map. The share of accepted tokens below was measured with them and will be lower."
        )
    if tensors is not None and tensors.vocabulary:
        parts.append("Its head scores the whole vocabulary, as engines need it, not the profile's draft vocabulary.")
    return parts


def _irregular(draft: PreTrainedConfig, full: PreTrainedConfig) -> list[str]:
    """Some engines take a layer's kind from its number instead of the configuration."""
    lists = [name for name in ("layer_types", "no_rope_layers") if _leaves_the_pattern(draft, full, name)]
    if not lists:
        return []
    named = " and ".join(f"`{name}`" for name in lists)
    return [
        f"Its layers' kinds do not follow the pattern of {draft.model_type} models any more ({named} in "
        "`config.json`). Engines that take them from the layer's number instead, as llama.cpp does, run another draft "
        f"{_from_when(draft, lists)}. The output stays right."
    ]


def _leaves_the_pattern(draft: PreTrainedConfig, full: PreTrainedConfig, name: str) -> bool:
    own, original = (list(getattr(config, name, None) or ()) for config in (draft, full))
    return own != original[: len(own)]


def _from_when(draft: PreTrainedConfig, lists: list[str]) -> str:
    """A layer's window shows in longer texts only, its positions at once."""
    if lists == ["layer_types"] and family_of(draft).rotary(draft, 0) is None:
        window = getattr(draft, "sliding_window", None)
        return f"once a text is longer than the window of {window} tokens, and accept fewer tokens there"
    return "and accept fewer tokens"


def _usage(profile: DraftProfile) -> str:
    target, tokens = _target(profile), profile.stopping.new_state().max_length
    settings = json.dumps({"method": "draft_model", "model": "DIR", "num_speculative_tokens": tokens})
    return f"""`DIR` is this folder, and `{target}` the target model. All of these verify the draft with the target.

vLLM (newer than 0.13):

```console
$ vllm serve {target} --speculative-config '{settings}'
```

llama.cpp, with both models converted (builds before May 2026 do without `--spec-type` and call the other option
`--draft-max`):

```console
$ python convert_hf_to_gguf.py DIR --outfile draft.gguf
$ llama-server -m target.gguf -md draft.gguf --spec-type draft-simple --spec-draft-n-max {tokens}
```

transformers:

```python
draft = AutoModelForCausalLM.from_pretrained("DIR", dtype=model.dtype)
model.generate(**inputs, assistant_model=draft)
```"""


RECORD_NAME = "layerskip_export.json"

_PROBE_TOKENS = 16
# Largest difference of logits, as a share of the largest logit. Float32 differs by the order of sums only.
_CLOSE = {torch.float32: 1e-4}
_CLOSE_IN_HALF_PRECISION = 0.05


@dataclass(frozen=True)
class Export:
    """What was exported.

    Args:
        folder: Where the checkpoint is.
        layers: The target model's layers that it has, ascending.
        trained: Number of trained layers that it has besides, in place of skipped sublayers.
        zeroed: Number of sublayers in ``layers`` that are skipped, so that their output projection is zero.
        parameters: Number of its weights.
        full_parameters: Number of the target model's weights.
        difference: Largest difference between the logits that stock transformers computes from the checkpoint and
            those of the draft, on a few tokens.
    """

    folder: Path
    layers: tuple[int, ...]
    trained: int
    zeroed: int
    parameters: int
    full_parameters: int
    difference: float


def export_draft(
    model: LayerSkipModel,
    tokenizer: PreTrainedTokenizerBase,
    profile: DraftProfile,
    folder: str | Path,
    *,
    without_bridges: bool = False,
) -> Export:
    """Write a profile's draft as a stand-alone checkpoint that plain transformers loads.

    It has the kept layers and the trained ones; of a layer of which one sublayer is skipped, that sublayer's output
    projection is zero. Dtype, tied embeddings and tokenizer are the model's. A draft vocabulary is left out: engines
    need the vocabulary of the target model. The folder appears when it is whole and the checkpoint, loaded again with
    stock transformers, has given the draft's logits; an earlier export there is replaced.

    Args:
        model: The profile's model.
        tokenizer: Its tokenizer.
        profile: What to export.
        folder: Where to; missing, empty, or an earlier export.
        without_bridges: Leave bridges out, which the architecture has no place for. What they replace is skipped
            all the same, so that fewer tokens will be accepted than were when the profile was measured.

    Raises:
        InvalidInputError: The profile has bridges, drafts with heads or at lower precision or skips nothing, or its
            trained layers are another model's.
        InvalidProfileError: The profile is for another model.
        ExportError: The folder holds something else or cannot be written, or the weights cannot be exported.
    """
    instance("profile", profile, DraftProfile)
    folder = Path(folder)
    check_exportable(profile, folder, without_bridges=without_bridges)
    identity = profile.check(model)
    if identity.fingerprint != profile.model.fingerprint:  # the profile fits these weights, but is not of them
        profile = profile.model_copy(update={"model": identity, "measured": None, "base_model_name_or_path": None})
    profile = with_hub_name(profile)
    trained = profile.weights(model).placed_on(model).layers
    stack = model.stack_of(profile.skip_set, stand_ins=DraftWeights(layers=trained).steps)
    draft = draft_model_of(model, profile.skip_set, trained)
    _set_draft_length(draft, profile.stopping)
    try:
        folder = folder.resolve()
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
        scratch.mkdir()
        try:
            draft.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            (scratch / CARD_NAME).write_text(export_card(profile, draft.config, model.config), encoding="utf-8")
            difference = _check(scratch, model, stack)
            _write_record(scratch, profile)
            _put_in_place(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise ExportError(f"{folder}: cannot write the draft: {error.strerror or error}") from error
    except (SafetensorError, ValueError) as error:
        raise ExportError(f"{folder}: cannot write the draft: {str(error).splitlines()[0]}") from error
    layers = kept_layers(profile.skip_set)
    return Export(
        folder=folder,
        layers=layers,
        trained=len(trained),
        zeroed=2 * len(layers) - len(profile.skip_set.kept),
        parameters=draft.num_parameters(),
        full_parameters=model.hf_model.num_parameters(),
        difference=difference,
    )


def check_exportable(profile: DraftProfile, folder: Path, *, without_bridges: bool = False) -> None:
    """Make sure of all that can be known before the model is loaded; see :func:`export_draft`.

    Raises:
        InvalidInputError: The profile has bridges, drafts with heads or at lower precision, or skips nothing.
        ExportError: The folder holds something else, or is no folder.
    """
    if profile.drafts_with_heads:
        raise InvalidInputError(
            "the profile drafts with heads on the target's hidden states, which are no model of their own, so that "
            "there is no checkpoint for other engines to write; a profile of a skip set can be exported"
        )
    if profile.precision != "full":
        raise InvalidInputError(
            f"the draft runs at {profile.precision}: a checkpoint would hold the rounded weights at full size, so that "
            "they cost other engines as much as the model itself; quantize the model with the engine's own tool, and "
            "draft with that"
        )
    if not len(profile.skip_set):
        raise InvalidInputError(
            "nothing is skipped: the draft would be a copy of the whole model; what makes it cheaper, a draft "
            "vocabulary, has no place in a checkpoint for other engines"
        )
    if profile.tensors is not None and profile.tensors.bridges and not without_bridges:
        raise InvalidInputError(
            f"the draft has bridges ({profile.tensors.bridges}): a bridge is a linear map of the hidden states, which "
            f"no layer of a {profile.model.family} model can be, so it cannot be folded in; without them "
            "(--without-bridges) the same sublayers are skipped, and fewer tokens will be accepted"
        )
    _check_place(folder)


def _check_place(folder: Path) -> None:
    try:
        there = {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return
    except OSError as error:
        raise ExportError(f"{folder}: cannot write the draft: {error.strerror}") from error
    others = sorted(there - _exported_files(folder))
    if others:
        raise ExportError(
            f"{folder}: holds what no export wrote ({others[0]}); choose a folder that is missing or empty, or an "
            "earlier export"
        )


def _exported_files(folder: Path) -> set[str]:
    """What an earlier export wrote there."""
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        return {RECORD_NAME, *record["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _set_draft_length(draft: PreTrainedModel, stopping: DraftStopping) -> None:
    """What ``generate(assistant_model=...)`` reads, so that it drafts as many tokens as the profile says."""
    state = stopping.new_state()
    settings: Any = draft.generation_config
    settings.num_assistant_tokens = state.max_length
    settings.num_assistant_tokens_schedule = "constant"
    settings.assistant_confidence_threshold = state.threshold


@torch.inference_mode()
def _check(folder: Path, model: LayerSkipModel, draft: Stack) -> float:
    """Load a checkpoint as anybody would and hold its logits against the draft's.

    Returns:
        The largest difference.

    Raises:
        ExportError: They differ.
    """
    stock: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=model.dtype, attn_implementation=model.config._attn_implementation
    )
    stock = stock.to(model.device).eval()
    count = min(_PROBE_TOKENS, model.context_length)
    tokens = torch.linspace(0, model.vocab_size - 1, count, device=model.device).long()
    expected = model.logits(draft.run(model.embed(tokens), model.pass_context(count, model.new_cache(count))))
    found = stock(tokens[None]).logits[0].float()
    difference = float((found - expected).abs().max())
    close = _CLOSE.get(model.dtype, _CLOSE_IN_HALF_PRECISION)
    if not difference <= close * float(expected.abs().max()):
        raise ExportError(
            f"the exported checkpoint gives other logits than the draft (by up to {difference:g}), so its architecture "
            f"({type(stock).__name__}) depends on its layers in a way that is not known here; please report it"
        )
    return difference


def _write_record(folder: Path, profile: DraftProfile) -> None:
    record = {
        "format": "layerskip.draft-export",
        "model": asdict(profile.model),
        "skip_set": asdict(profile.skip_set),
        "files": sorted(path.name for path in folder.iterdir()),
    }
    (folder / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _put_in_place(scratch: Path, folder: Path) -> None:
    """Rename a finished folder to its place. An older one is set aside until then, and back if that fails."""
    if not folder.exists():
        scratch.rename(folder)
        return
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.old")
    folder.rename(aside)
    try:
        scratch.rename(folder)
    except OSError:
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
