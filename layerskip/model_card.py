"""The model card of a draft profile: the README of its folder or its repository, with what was measured."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData

if TYPE_CHECKING:
    from layerskip.profile import DraftProfile, Measured

CARD_NAME = "README.md"

_TAGS = ["layerskip", "speculative-decoding", "self-speculative-decoding"]
_MARK = "<!-- Written by layerskip. sha256 of the text above: {}. A card that somebody changed is left alone. -->\n"
_MARKED = re.compile(r"(?s)(?P<text>.*)" + re.escape(_MARK).replace(r"\{\}", r"(?P<checksum>[0-9a-f]{64})"))
# What a folder or a repository with a model, or an adapter, in it has.
_MODEL_FILES = {"config.json", "adapter_config.json", "params.json"}
_MODEL_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".onnx")
_OWN_TENSORS = re.compile(r"draft-[0-9a-f]{16}\.safetensors")


def card_of(profile: DraftProfile, name: str) -> str:
    """The card of a profile, in Markdown with YAML metadata.

    Args:
        profile: The profile.
        name: What to give to ``DraftProfile.from_pretrained``: a repository on the hub, or a folder's name.
    """
    base = profile.base_model_name_or_path
    sections = [
        f"---\n{metadata(base)}\n---",
        f"# A draft profile for {base or profile.model.id}",
        f"{_of(base) or profile.model.id} can draft for itself: {_how(profile)} and verifies them with the full model. "
        "The output is that of the full model.",
        _table(profile),
        measured_in_words(profile.measured),
        "## Use",
        _usage(profile, name),
    ]
    return _marked("\n\n".join(sections) + "\n\n")


def _how(profile: DraftProfile) -> str:
    if profile.drafts_with_heads:
        return "layerskip lets small trained heads on its hidden states propose a few tokens"
    return "layerskip leaves out the sublayers named below, lets the rest propose a few tokens"


def card_is_welcome(files: Collection[str], card: str | None) -> bool:
    """Whether a card may be written: never over somebody's own, and not into a model's own folder or repository.

    Args:
        files: Names of the files that are there.
        card: The text of the card that is there, if one is.
    """
    return not _holds_a_model(files) and (card is None or _is_untouched(card))


def metadata(base: str | None, *, library: str = "layerskip") -> str:
    """The card's YAML: ``base_model`` (where it is known), ``library_name``, ``pipeline_tag`` and ``tags``."""
    data = ModelCardData(base_model=base, library_name=library, pipeline_tag="text-generation", tags=_TAGS)
    yaml: str = data.to_yaml()
    return yaml


def measured_in_words(measured: Measured | None) -> str:
    """What was measured, with the machine and the circumstances."""
    if measured is None:
        return "Of its speed nothing was measured."
    rate = measured.acceptance_rate
    accepted = "nothing was drafted" if rate is None else f"{rate:.0%} of the drafted tokens were accepted"
    prompts = {
        "held-out": "that the search never saw",
        "search": "that the search itself optimized for, which flatters",
    }
    versions = ", ".join(f"{name} {version}" for name, version in measured.versions.items())
    words = (
        f"Measured: **{measured.speedup:.2f}×** the speed of plain decoding (95 % interval: "
        f"{measured.speedup_low:.2f} to {measured.speedup_high:.2f}), {measured.plain_tokens_per_second:.1f} → "
        f"{measured.speculative_tokens_per_second:.1f} tokens/s; {accepted}. On {measured.device} in {measured.dtype}, "
        f"over {measured.prompts} prompts {prompts[measured.prompt_set]}, of at most {measured.max_new_tokens} new "
        f"tokens each, with {versions}. Elsewhere it may differ: measure again."
    )
    return words if measured.speedup > 1 else f"{words} **That is slower than plain decoding.**"


def _table(profile: DraftProfile) -> str:
    model, provenance = profile.model, profile.provenance
    rows = {
        "model": f"{model.family}, {model.num_layers} layers, fingerprint `{model.fingerprint}`"
        + (f", revision `{profile.revision}`" if profile.revision else ""),
        "skipped": f"{profile.skip_set} ({len(profile.skip_set)} of {2 * model.num_layers} sublayers)",
        "draft": profile.draft,
        "made": f"{provenance.created:%Y-%m-%d}, {provenance.origin}, {provenance.tool}",
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {_cell(value)} |" for key, value in rows.items())])


def _usage(profile: DraftProfile, name: str) -> str:
    revision = f", revision={profile.revision!r}" if profile.revision else ""
    return f"""```python
from layerskip import DraftProfile, LayerSkipModel, generate, load_checkpoint

checkpoint = load_checkpoint({profile.model.id!r}{revision})
model = LayerSkipModel(checkpoint.model)
drafter = DraftProfile.from_pretrained({name!r}).drafter(model)
generation = generate(model, checkpoint.tokenizer("Once upon a time").input_ids, drafter=drafter, max_new_tokens=100)
print(checkpoint.tokenizer.decode(generation.tokens))
```"""


def _of(base: str | None) -> str | None:
    return base and f"[{base}](https://huggingface.co/{base})"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _marked(text: str) -> str:
    return text + _MARK.format(hashlib.sha256(text.encode()).hexdigest())


def _is_untouched(card: str) -> bool:
    """Whether a card was written here and nobody changed it since."""
    marked = _MARKED.fullmatch(card)
    return marked is not None and card == _marked(marked["text"])


def _holds_a_model(files: Collection[str]) -> bool:
    return any(
        name in _MODEL_FILES or (name.endswith(_MODEL_SUFFIXES) and not _OWN_TENSORS.fullmatch(name)) for name in files
    )
