"""The README of an exported draft: what it is, and the commands of the engines that take it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from transformers import PreTrainedConfig

from layerskip.draft_model import kept_layers
from layerskip.model_card import measured_in_words, metadata
from layerskip.stack.families import family_of

if TYPE_CHECKING:
    from layerskip.profile import DraftProfile


def export_card(profile: DraftProfile, draft: PreTrainedConfig, full: PreTrainedConfig) -> str:
    """The README, in Markdown with YAML metadata.

    Args:
        profile: The exported profile.
        draft: Configuration of the exported checkpoint.
        full: Configuration of the full model.
    """
    sections = [
        f"---\n{metadata(profile.base_model_name_or_path, library='transformers')}\n---",
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
    target, tokens = _target(profile), profile.draft_exit.controller().max_length
    settings = json.dumps({"method": "draft_model", "model": "DIR", "num_speculative_tokens": tokens})
    return f"""`DIR` is this folder, and `{target}` the full model. All of these verify the draft with the full model.

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
