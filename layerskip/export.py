"""A draft as a checkpoint of its own, for engines that take a separate draft model."""

from __future__ import annotations

import json
import secrets
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from layerskip.decoding.draft_exit import DraftExit
from layerskip.draft_model import draft_model_of, kept_layers
from layerskip.drafts.assets import DraftAssets
from layerskip.errors import ExportError, InvalidInputError
from layerskip.export_card import export_card
from layerskip.hub import published
from layerskip.model_card import CARD_NAME
from layerskip.stack.model import LayerSkipModel
from layerskip.stack.stack import Stack

if TYPE_CHECKING:
    from layerskip.profile import DraftProfile

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
        layers: The full model's layers that it has, ascending.
        trained: Number of trained layers that it has besides, in place of skipped sublayers.
        zeroed: Number of sublayers in ``layers`` that are skipped, so that their output projection is zero.
        parameters: Number of its weights.
        full_parameters: Number of the full model's weights.
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
    need the vocabulary of the full model. The folder appears when it is whole and the checkpoint, loaded again with
    stock transformers, has given the draft's logits; an earlier export there is replaced.

    Args:
        model: The profile's model.
        tokenizer: Its tokenizer.
        profile: What to export.
        folder: Where to; missing, empty, or an earlier export.
        without_bridges: Leave bridges out, which the architecture has no place for. What they stand in for is skipped
            all the same, so that fewer tokens will be accepted than were when the profile was measured.

    Raises:
        InvalidInputError: The profile has bridges, drafts with heads or skips nothing, or its trained layers are
            another model's.
        InvalidProfileError: The profile is for another model.
        ExportError: The folder holds something else or cannot be written, or the weights cannot be exported.
    """
    folder = Path(folder)
    check_exportable(profile, folder, without_bridges=without_bridges)
    profile.check(model)
    profile = published(profile)
    trained = profile.assets.to(torch.empty(0, dtype=model.dtype, device=model.device)).layers
    stack = model.stack_of(profile.skip_set, stand_ins=DraftAssets(layers=trained).stand_ins(model))
    draft = draft_model_of(model, profile.skip_set, trained)
    _set_draft_length(draft, profile.draft_exit)
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
        InvalidInputError: The profile has bridges, drafts with heads, or skips nothing.
        ExportError: The folder holds something else, or is no folder.
    """
    if profile.drafts_with_heads:
        raise InvalidInputError(
            "the profile drafts with heads on the full model's hidden states, which are no model of their own, so that "
            "there is no checkpoint for other engines to write; a profile of a skip set can be exported"
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


def _set_draft_length(draft: PreTrainedModel, draft_exit: DraftExit) -> None:
    """What ``generate(assistant_model=...)`` reads, so that it drafts as many tokens as the profile says."""
    controller = draft_exit.controller()
    settings: Any = draft.generation_config
    settings.num_assistant_tokens = controller.max_length
    settings.num_assistant_tokens_schedule = "constant"
    settings.assistant_confidence_threshold = controller.threshold


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
