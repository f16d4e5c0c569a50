"""Shared by the benchmarks: a model, held-out prompts, and a JSON file for the figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from layerskip import DraftProfile, LayerSkipModel, load_checkpoint
from layerskip.engine import Engine, make_engine
from layerskip.hub import load_profile
from layerskip.utils import device_name, dtype_name, library_versions
from search.prompts import EncodedPrompt, built_in_prompts, split_prompts


@dataclass(frozen=True)
class Setting:
    """A loaded model's engine, held-out prompts to decode, and the prompts of the search."""

    engine: Engine
    prompts: tuple[EncodedPrompt, ...]
    search: tuple[EncodedPrompt, ...]

    @property
    def model(self) -> LayerSkipModel:
        """The model."""
        return self.engine.model


def load_setting(
    model: str, *, device: str, dtype: str, prompts: int, max_new_tokens: int, engine: str = "auto"
) -> Setting:
    """Load a model, measure the costs of its passes, and take some of the built-in held-out prompts."""
    checkpoint = load_checkpoint(model, device=device, dtype=dtype)
    wrapped = LayerSkipModel(checkpoint.model)
    split = split_prompts(
        built_in_prompts(), checkpoint.tokenizer, max_new_tokens=max_new_tokens, context_length=wrapped.context_length
    )
    return Setting(make_engine(wrapped, engine), split.held_out[:prompts], split.search)


def loaded_profiles(paths: Sequence[Path], model: str, *, device: str, dtype: str) -> dict[str, DraftProfile]:
    """Profiles by the names of their files; without any, the model's ready profile."""
    if not paths:
        return {model: load_profile(model, device=device, dtype=dtype)}
    return {path.stem: DraftProfile.load(path) for path in paths}


def machine_of(model: LayerSkipModel) -> dict[str, Any]:
    """The date, the device and the versions of a measurement."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": device_name(model.device),
        "dtype": dtype_name(model.dtype),
        "versions": library_versions(),
    }


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write a benchmark's result, if there is a file for it."""
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
