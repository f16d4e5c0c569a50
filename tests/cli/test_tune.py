"""``layerskip tune``: from a model to a profile of a trained draft, in one command."""

import json
from pathlib import Path

import pytest

from layerskip import DraftProfile, SkipSet, generate
from layerskip.drafting.weights import DraftWeights
from layerskip.training import Agreement, EvalResult, Trained
from search.callbacks import Evaluated, PhaseStarted, TrainingEnded
from tests.hub import contents
from tests.models import transformers_greedy

QUICK = ("--positions", 300, "--epochs", 2, "--max-new-tokens", 8, "--device", "cpu")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"Tell me about {what}.\n" for what in range(48)))
    return path


def test_a_model_is_tuned_and_its_profile_applied(layerskip, model_folder, prompts, wrapped):
    outcome = layerskip("tune", model_folder, "--exit", 1, "--prompts", prompts, "--out", "t.json", "--json", *QUICK)
    assert outcome.status == 0, outcome.err
    result = outcome.object
    assert result["exit"] == 1
    assert result["positions"] >= 300
    assert list(result["agreement"]) == ["1", "2", "4", "8"]
    assert result["speedup"] > 0
    assert result["predicted_speedup"] > 0
    profile = DraftProfile.load("t.json")
    assert profile.skip_set == SkipSet(4, (1, 2, 3), (1, 2, 3))
    assert (profile.tensors.layers, profile.tensors.bridges, profile.tensors.vocabulary) == (1, 0, 0)
    assert profile.measured.speedup == result["speedup"]
    assert profile.measured.prompt_set == "held-out"
    assert profile.provenance.origin.startswith("trained for ")
    made = generate(wrapped, [5, 6, 7], drafter=profile.drafter(wrapped), max_new_tokens=16, eos_token_ids=[])
    assert made.tokens == transformers_greedy(wrapped.hf_model, [5, 6, 7], 16)
    assert "held-out agreement" in outcome.err
    applied = layerskip("apply", "t.json", "Hello", "--force", "--json", "--max-new-tokens", 8)
    assert applied.object["speculative"]
    shown = layerskip("profile", "show", "t.json")
    assert "1 draft layer" in shown.out


def test_a_profile_is_tuned_where_it_exits(layerskip, model_folder, prompts):
    common = ("--prompts", prompts, *QUICK)
    first = layerskip("tune", model_folder, "--exit", 2, "--draft-vocabulary", 100, "--out", "a.json", *common)
    assert first.status == 0, first.err
    assert "exit      after layer 2 of 4" in first.out
    again = layerskip("tune", "a.json", "--kind", "bridge", "--loss", "both", "--out", "b.json", "--json", *common)
    assert again.status == 0, again.err
    assert again.object["exit"] == 2
    assert again.object["coverage"] < 1
    profile = DraftProfile.load("b.json")
    assert (profile.tensors.layers, profile.tensors.bridges, profile.tensors.vocabulary) == (0, 1, 100)


def test_a_profile_is_tuned_for_its_revision_of_the_model(
    layerskip, hub, model_folder, other_model_folder, make_profile, prompts
):
    repository = hub.add("owner/tiny", contents(other_model_folder))
    repository.commit("v1", contents(model_folder))
    path = make_profile(1.25, model="owner/tiny")
    DraftProfile.load(path).for_base_model("owner/base", "v1").save(path)
    done = layerskip("tune", path, "--kind", "medusa", "--prompts", prompts, "--out", "t.json", *QUICK)
    assert done.status == 0, done.err
    assert "simulated with the costs measured on this device" in done.out
    tuned = DraftProfile.load("t.json")
    assert (tuned.base_model_name_or_path, tuned.revision) == ("owner/base", "v1")
    assert tuned.model == DraftProfile.load(path).model


@pytest.mark.parametrize("kind", ["medusa", "hydra", "hydra++"])
def test_heads_are_trained_and_applied(layerskip, model_folder, prompts, wrapped, kind):
    common = ("--kind", kind, "--heads", 2, "--prompts", prompts, *QUICK)
    outcome = layerskip("tune", model_folder, "--out", "h.json", *common)
    assert outcome.status == 0, outcome.err
    assert "heads     2, on " in outcome.out
    assert "by head" in outcome.err
    profile = DraftProfile.load("h.json")
    assert len(profile.skip_set) == 0
    assert (profile.tensors.heads, profile.weights(wrapped).heads.kind) == (2, kind.removesuffix("++"))
    assert profile.tensors.layers == (kind == "hydra++")
    assert profile.measured is not None
    made = generate(wrapped, [5, 6, 7], drafter=profile.drafter(wrapped), max_new_tokens=16, eos_token_ids=[])
    assert made.tokens == transformers_greedy(wrapped.hf_model, [5, 6, 7], 16)
    applied = layerskip("apply", "h.json", "Hello", "--force", "--json", "--max-new-tokens", 8)
    assert applied.object["speculative"]
    assert "2 draft heads" in layerskip("profile", "show", "h.json").out
    again = layerskip("tune", "h.json", "--out", "i.json", "--json", *common).object
    assert (again["exit"], again["heads"]) == (None, 2)
    assert [list(top) for top in again["agreement_by_head"]] == [["1", "2", "4", "8"]] * 2
    exported = layerskip("export", "h.json", "--to", "draft")
    assert exported.status == 2
    assert "drafts with heads" in exported.error


def test_texts_and_training_are_used_again(layerskip, model_folder, prompts):
    arguments = ("tune", model_folder, "--exit", 3, "--prompts", prompts, "--json", *QUICK)
    first, again = (layerskip(*arguments).object for _ in range(2))
    assert again["agreement"] == first["agreement"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kind", "head"), "kind 'head' is unknown; expected layer, bridge, medusa, hydra, hydra++"),
        (
            ("--kind", "medusa", "--exit", "2"),
            "exit: medusa heads draft after all layers, so there is none; leave it out",
        ),
        (("--heads", "2"), "heads: a layer has none; leave it out, or choose medusa, hydra or hydra++"),
        (("--kind", "hydra", "--heads", "0"), "heads: expected at least 1, got 0"),
        (("--loss", "mse"), "loss 'mse' is unknown; expected kl, ce, both"),
        (("--positions", "0"), "positions: expected at least 1, got 0"),
        (("--minutes", "0"), "minutes: expected a number above 0, got 0.0"),
        (("--draft-vocabulary", "-1"), "draft vocabulary: expected a number of tokens from 0 on, got -1"),
        (("--exit", "0"), "exit: expected at least 1, got 0"),
        (("--exit", "4"), "exit: expected 1 to 3, layers of the model to keep, got 4"),
    ],
)
def test_wrong_usage_is_one_line(layerskip, model_folder, prompts, arguments, message):
    outcome = layerskip("tune", model_folder, "--prompts", prompts, *arguments)
    assert outcome.status == 2
    assert outcome.err.removeprefix(f"loading {model_folder}\n") == f"layerskip: {message}\n"


def test_a_model_that_cannot_write_prompts_asks_for_some(layerskip, model_folder):
    outcome = layerskip("tune", model_folder, "--exit", 1, *QUICK)
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1].endswith("has no end-of-sequence token to end its own prompts; give --prompts")


def test_a_profile_that_is_no_early_exit_is_refused(layerskip, profile):
    outcome = layerskip("tune", profile)
    assert outcome.status == 2
    assert "attn 1 · mlp 2, which is no early exit" in outcome.error


def press_ctrl_c(patched, when):
    """Press Ctrl-C at the events for which ``when`` holds, once they are shown."""
    from cli.progress import ProgressDisplay

    show = ProgressDisplay.__call__

    def press(self, event):
        show(self, event)
        if when(event):
            raise KeyboardInterrupt

    patched.setattr(ProgressDisplay, "__call__", press)


def test_ctrl_c_after_the_training_says_that_the_same_command_resumes(layerskip, model_folder, prompts, monkeypatch):
    arguments = ("tune", model_folder, "--exit", 1, "--prompts", prompts, "--seed", 6, "--out", "m.json", *QUICK)
    with monkeypatch.context() as patched:
        press_ctrl_c(patched, lambda event: event == PhaseStarted("costs"))
        stopped = layerskip(*arguments)
    assert (stopped.status, stopped.out) == (130, "")
    assert "texts and training are kept, no profile was written; the same command resumes" in stopped.err
    assert not Path("m.json").exists()
    assert layerskip(*arguments).status == 0
    assert DraftProfile.load("m.json").measured is not None


@pytest.mark.parametrize(
    ("progress", "interrupted", "said"),
    [
        (0.485, False, "training stopped at 48 %: no gain in the last evaluations; best state kept\n"),
        (1.0, False, ""),
        (0.5, True, ""),
    ],
)
def test_a_training_that_ends_early_says_why(capsys, progress, interrupted, said):
    from cli.progress import ProgressDisplay

    agreement = Agreement(positions=100, loss=1.0, coverage=1.0, top={1: 0.5})
    trained = Trained(DraftWeights(), agreement, [EvalResult(progress, 1.0, agreement, best=False)], interrupted)
    ProgressDisplay()(TrainingEnded(trained))
    assert capsys.readouterr().err == said


def test_ctrl_c_keeps_the_best_and_the_next_run_resumes(layerskip, model_folder, prompts, monkeypatch):
    arguments = ("tune", model_folder, "--exit", 1, "--prompts", prompts, "--seed", 5, "--out", "c.json", *QUICK)

    with monkeypatch.context() as patched:
        press_ctrl_c(patched, lambda event: isinstance(event, Evaluated) and event.result.progress > 0)
        stopped = layerskip(*arguments)
    assert stopped.status == 130
    assert "nothing was measured" in stopped.out
    fields = json.loads(Path("c.json").read_text())
    assert fields["measured"] is None
    assert fields["tensors"]["layers"] == 1
    assert layerskip(*arguments).status == 0
    assert DraftProfile.load("c.json").measured is not None
