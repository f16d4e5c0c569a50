"""``layerskip export``."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from layerskip import DraftConfig, DraftProfile, FixedLength, LayerSkipModel, SkipSet
from layerskip.drafting.bridges import Bridge
from layerskip.drafting.weights import DraftWeights
from layerskip.fingerprint import identify
from layerskip.profile import Provenance
from tests.cli.conftest import save_model


def test_export_writes_a_checkpoint_that_transformers_loads(layerskip, profile, elsewhere):
    done = layerskip("export", profile, "--to", "draft")
    assert (done.status, done.err) == (0, "")
    assert "layers    4 of 4, 2 sublayers of them zeroed" in done.out
    assert "loaded with stock transformers" in done.out
    assert AutoModelForCausalLM.from_pretrained(elsewhere / "draft").config.num_hidden_layers == 4


def test_export_prints_what_it_wrote_as_json(layerskip, profile):
    printed = layerskip("export", profile, "--to", "draft", "--json").object
    assert printed["difference"] < 1e-3
    assert printed | {"difference": 0} == {
        "folder": "draft",
        "layers": [0, 1, 2, 3],
        "trained": 0,
        "zeroed": 2,
        "parameters": printed["full_parameters"],
        "full_parameters": printed["full_parameters"],
        "difference": 0,
    }


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_export_keeps_the_dtype_that_the_model_is_stored_in_unless_told_another(
    layerskip, tmp_path, elsewhere, dtype, expected
):
    folder = save_model(tmp_path / "model", seed=3)
    model = AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).eval()
    model.save_pretrained(folder)
    saved(model, folder).save(tmp_path / "profile.json")
    done = layerskip("export", tmp_path / "profile.json", "--to", "draft", "--dtype", dtype)
    assert (done.status, done.err) == (0, "")
    assert "layers    3 of 4\n" in done.out
    assert AutoModelForCausalLM.from_pretrained(elsewhere / "draft", dtype="auto").dtype == expected


def saved(model, folder, weights=None):
    return DraftProfile.of(
        DraftConfig(SkipSet(4, attention=(1,), mlp=(1,)), stopping=FixedLength(3)),
        weights,
        model=identify(LayerSkipModel(model), str(folder)),
        provenance=Provenance(created=datetime(2026, 1, 2, tzinfo=UTC), tool="by hand"),
    )


def test_export_leaves_bridges_out_only_when_told_and_says_what_it_leaves_out(layerskip, checkpoint, model_folder):
    size = checkpoint.model.config.hidden_size
    assets = DraftWeights(bridges=[Bridge(2, 4, [torch.eye(size)], torch.zeros(size))], token_ids=torch.tensor([1, 2]))
    saved(checkpoint.model, model_folder, assets).save("profile.json")
    refused = layerskip("export", "profile.json", "--to", "draft")
    assert refused.status == 2
    assert "--without-bridges" in refused.error
    assert not Path("draft").exists()
    done = layerskip("export", "profile.json", "--to", "draft", "--without-bridges")
    assert done.status == 0
    assert "without them it will be lower" in done.err
    assert "draft vocabulary is left out" in done.err


def test_a_folder_with_something_else_in_it_is_refused_before_the_model_is_loaded(layerskip, make_profile):
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("mine")
    done = layerskip("export", make_profile(1.5, model="/no/such/model"), "--to", "mine")
    assert (done.status, done.error) == (
        1,
        "mine: holds what no export wrote (thesis.txt); choose a folder that is missing or empty, or an earlier export",
    )


def test_a_model_elsewhere_is_taken_from_there(layerskip, make_profile, model_folder, narrow_model_folder):
    moved = make_profile(1.5, model="/no/such/model")
    assert layerskip("export", moved, "--to", "draft", "--model", model_folder).status == 0
    assert json.loads(Path("draft/layerskip_export.json").read_text())["format"] == "layerskip.draft-export"
    other = layerskip("export", moved, "--to", "other", "--model", narrow_model_folder)
    assert other.status == 1
    assert "model.intermediate_size" in other.error
    assert "no such file or folder" in layerskip("export", moved, "--to", "other").error
