"""Public functions given odd values: a result, an error of layerskip's own or a TypeError, and nothing else."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import layerskip
from layerskip import (
    AdaptiveThreshold,
    Chat,
    ConfidenceThreshold,
    DraftConfig,
    DraftProfile,
    FixedLength,
    LayerSkipModel,
    PrefixCache,
    PromptLookup,
    Sampling,
    SkipSet,
    StopStrings,
    export_draft,
    generate,
    load_checkpoint,
    load_profile,
    make_drafter,
    make_engine,
    speculate,
    stream,
    stream_rounds,
)
from layerskip.errors import LayerSkipError
from tests.models import LAYERS, tiny_llama, tiny_tokenizer

ODD = {
    "None": None,
    "true": True,
    "-1": -1,
    "0": 0,
    "huge": 10**30,
    "1.5": 1.5,
    "nan": math.nan,
    "inf": math.inf,
    "empty text": "",
    "text": "x",
    "lone surrogate": "a\udce9",
    "nul": "a\x00b",
    "bytes": b"x",
    "empty list": [],
    "nested": [[]],
    "texts": ["a", ""],
    "floats": [1.5, 2.5],
    "negative": [-1],
    "far": [10**9],
    "dict": {},
    "object": object(),
    "type": int,
    "function": len,
    "path": Path("/nowhere/at/all"),
    "folder": Path("/"),
    "scalar tensor": torch.tensor(3),
    "floating tensor": torch.ones(2, 2),
    "empty tensor": torch.empty(0, dtype=torch.long),
    "complex": torch.ones(1, dtype=torch.complex64),
    "array": np.array([1, 2]),
    "text array": np.array(["a"]),
    "set": {1},
    "range": range(3),
}


@pytest.fixture(scope="module")
def model():
    return LayerSkipModel(tiny_llama())


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def calls(model, tokenizer, folder):
    """For each public function a call with one odd value, by what is odd."""
    small = {"max_new_tokens": 2}
    yield "generate: model", lambda odd: generate(odd, [1], **small)
    yield "generate: prompt", lambda odd: generate(model, odd, **small)
    for option in ("engine", "drafter", "sampling", "max_new_tokens", "eos_token_ids", "stop", "prompt_cache"):
        yield f"generate: {option}", lambda odd, option=option: generate(model, [1, 2], **(small | {option: odd}))
    yield "stream: prompt", lambda odd: list(stream(model, odd, **small))
    yield "stream_rounds: prompt", lambda odd: list(stream_rounds(model, odd, **small))
    for name in ("temperature", "top_k", "top_p", "seed"):
        yield (
            f"Sampling: {name}",
            lambda odd, name=name: generate(
                model, [1], sampling=Sampling(**({"temperature": 1.0} | {name: odd})), **small
            ),
        )
    yield "SkipSet: num_layers", lambda odd: SkipSet(odd)
    yield "SkipSet: attention", lambda odd: SkipSet(LAYERS, attention=odd)
    yield "SkipSet: mlp", lambda odd: SkipSet(LAYERS, mlp=odd)
    yield "FixedLength", FixedLength
    yield "ConfidenceThreshold: threshold", lambda odd: ConfidenceThreshold(odd)
    yield "ConfidenceThreshold: max_length", lambda odd: ConfidenceThreshold(0.5, odd)
    yield "AdaptiveThreshold", AdaptiveThreshold
    for name in ("shortest", "length", "per_match"):
        yield f"PromptLookup: {name}", lambda odd, name=name: PromptLookup(**{name: odd})
    for name in ("skip_set", "stopping", "precision", "tree", "vocabulary_size", "prompt_lookup"):
        yield (
            f"DraftConfig: {name}",
            lambda odd, name=name: make_drafter(model, DraftConfig(**({"skip_set": SkipSet(LAYERS)} | {name: odd}))),
        )
    yield "make_drafter: model", lambda odd: make_drafter(odd, DraftConfig(SkipSet(LAYERS)))
    yield "make_drafter: config", lambda odd: make_drafter(model, odd)
    yield "make_engine: model", lambda odd: make_engine(odd)
    yield "make_engine: name", lambda odd: make_engine(model, odd)
    yield "LayerSkipModel", LayerSkipModel
    yield "DraftProfile.load", DraftProfile.load
    yield "load_profile", load_profile
    yield "load_checkpoint: model", load_checkpoint
    yield "load_checkpoint: device", lambda odd: load_checkpoint("/nowhere", device=odd)
    yield "load_checkpoint: dtype", lambda odd: load_checkpoint("/nowhere", dtype=odd)
    yield "speculate: profile", speculate
    yield "StopStrings: tokenizer", lambda odd: StopStrings(odd, ["a"])
    yield "StopStrings: strings", lambda odd: StopStrings(tokenizer, odd)
    yield "Chat: model", lambda odd: Chat(odd, tokenizer)
    yield "Chat: tokenizer", lambda odd: Chat(model, odd)
    yield "PrefixCache: engine", lambda odd: PrefixCache().reuse(odd, [1], 4)
    yield "export_draft: profile", lambda odd: export_draft(model, tokenizer, odd, folder / "draft")


def test_odd_values_end_in_a_result_or_in_an_error_that_says_what_is_wrong(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    wrong = []
    for (name, call), (odd, value) in itertools.product(calls(model, tokenizer, tmp_path), ODD.items()):
        try:
            call(value)
        except LayerSkipError as error:
            if "\n" in str(error):
                wrong.append(f"{name} of {odd}: several lines: {error}")
        except TypeError:
            pass  # the wrong type altogether; Python's own errors name it
        except Exception as error:
            wrong.append(f"{name} of {odd}: {type(error).__name__}: {str(error)[:100]}")
    assert not wrong, "\n".join(wrong)


def test_every_public_function_is_tried(model, tokenizer, tmp_path):
    tried = {name.partition(":")[0].partition(".")[0] for name, _ in calls(model, tokenizer, tmp_path)}
    assert set(layerskip.__all__) - tried == {"LayerSkipError"}
