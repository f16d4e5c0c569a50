"""Profiles travel through folders and the Hub with their tensors and a card, and a model's own files stay as they are.

The Hub is a fake on the loopback address; the client is huggingface_hub's own.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import constants

from layerskip import DraftProfile, LayerSkipModel, generate, load_checkpoint
from layerskip.errors import HubError, InvalidInputError, InvalidProfileError
from layerskip.fingerprint import identify
from layerskip.hub import download_profile, load_profile, push_profile, save_profile
from tests.hub import TOKEN, FakeHub, contents
from tests.layerskip.test_profile import IDENTITY, MEASURED, a_profile, profile_for, same_weights, some_weights
from tests.models import tiny_llama, tiny_tokenizer, transformers_greedy

BASE = "tiny-models/base"


@pytest.fixture
def offline(monkeypatch):
    """From a call on, as with HF_HUB_OFFLINE=1."""
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def published(weights=None, **parts):
    """A profile that says which model on the Hub it is for."""
    return a_profile(weights, **parts).for_base_model(BASE)


# Folders.


def test_a_folder_gets_the_profile_its_tensors_and_a_card(tmp_path):
    profile = published(some_weights())
    save_profile(profile, tmp_path / "new" / "folder")
    loaded = load_profile(tmp_path / "new" / "folder")
    assert same_weights(loaded, some_weights())
    assert loaded == profile.model_copy(update={"model": replace(IDENTITY, id=BASE)})
    names = [path.name for path in (tmp_path / "new" / "folder").iterdir()]
    assert sorted(names) == sorted(["README.md", "draft_profile.json", profile.tensors.file])


def test_a_profile_decodes_the_same_after_a_trip_through_a_folder(tmp_path, llama):
    save_profile(profile_for(llama), tmp_path)
    drafter = load_profile(tmp_path).drafter(llama)
    assert generate(llama, [1, 2, 3], drafter=drafter, max_new_tokens=8).tokens == transformers_greedy(
        llama.hf_model, [1, 2, 3], 8
    )


def test_a_model_s_own_folder_keeps_every_file_as_it_is(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("The model's own card.\n")
    before = contents(tmp_path)
    profile = published(some_weights())
    save_profile(profile, tmp_path)
    assert contents(tmp_path) == before | {
        name: (tmp_path / name).read_bytes() for name in ("draft_profile.json", profile.tensors.file)
    }


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json", "model.gguf", "model-00001-of-2.safetensors"])
def test_a_folder_with_a_model_gets_no_card(tmp_path, file):
    (tmp_path / file).write_bytes(b"a model's")
    save_profile(published(), tmp_path)
    assert sorted(contents(tmp_path)) == sorted(["draft_profile.json", file])


def test_the_card_follows_the_profile_until_somebody_edits_it(tmp_path):
    card = tmp_path / "README.md"
    save_profile(published(), tmp_path)
    assert "**1.25×**" in card.read_text()
    save_profile(published(measured=MEASURED.model_copy(update={"speedup": 1.5})), tmp_path)
    assert "**1.50×**" in card.read_text()
    card.write_text(card.read_text().replace("# A draft profile", "# My draft profile"))
    edited = card.read_text()
    save_profile(published(measured=None), tmp_path)
    assert card.read_text() == edited


def test_a_card_of_somebody_else_stays(tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xff not even text")
    save_profile(published(), tmp_path)
    assert (tmp_path / "README.md").read_bytes() == b"\xff not even text"


def test_a_profile_s_own_file_is_as_good_as_its_folder(tmp_path):
    published().save(tmp_path / "mine.json")
    assert load_profile(tmp_path / "mine.json") == published()


def test_a_subfolder_is_looked_into(tmp_path):
    save_profile(published(), tmp_path / "sub")
    assert DraftProfile.load(tmp_path / "sub").base_model_name_or_path == BASE


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{}", "{}/draft_profile.json: cannot read the draft profile: No such file or directory"),
        ("{}/none.json", "{}/none.json: cannot read the draft profile: No such file or directory"),
        ("profiles/none.json", "profiles/none.json: cannot read the draft profile: No such file or directory"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, name, message):
    with pytest.raises(InvalidProfileError) as error:
        load_profile(name.format(tmp_path))
    assert str(error.value) == f"{message.format(tmp_path)}; 'layerskip search MODEL' makes one"


def test_a_file_is_no_folder_to_save_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidProfileError, match="file: cannot write the draft profile: File exists"):
        save_profile(published(), tmp_path / "file")


# What the profile says of its model.


@pytest.mark.parametrize(
    ("id", "base", "saved_id", "saved_base"),
    [
        ("owner/model", None, "owner/model", "owner/model"),
        ("smollm2", None, "smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("/home/me/models/secret", None, "/home/me/models/secret", None),
        ("/home/me/models/secret", BASE, BASE, BASE),
        ("model.gguf", BASE, BASE, BASE),
        ("owner/model", BASE, "owner/model", BASE),
    ],
)
def test_a_saved_profile_names_its_model_as_the_hub_does_where_that_is_known(tmp_path, id, base, saved_id, saved_base):
    profile = a_profile(model=replace(IDENTITY, id=id)).model_copy(update={"base_model_name_or_path": base})
    save_profile(profile, tmp_path)
    saved = json.loads((tmp_path / "draft_profile.json").read_text())
    assert (saved["model"]["id"], saved["base_model_name_or_path"]) == (saved_id, saved_base)


def test_a_folder_here_that_looks_like_a_repository_is_no_repository(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    save_profile(a_profile(model=replace(IDENTITY, id="models/mine")), tmp_path / "out")
    assert load_profile("out").base_model_name_or_path is None


def test_a_profile_without_these_fields_still_loads(tmp_path):
    fields = json.loads(a_profile().model_dump_json())
    del fields["base_model_name_or_path"], fields["revision"]
    (tmp_path / "draft_profile.json").write_text(json.dumps(fields))
    assert load_profile(tmp_path) == a_profile()


# The card.


def card_of(tmp_path, profile):
    save_profile(profile, tmp_path / "a-folder")
    _, metadata, text = (tmp_path / "a-folder" / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_the_card_has_the_hub_s_metadata(tmp_path):
    metadata, _ = card_of(tmp_path, published())
    assert metadata == {
        "base_model": BASE,
        "library_name": "layerskip",
        "pipeline_tag": "text-generation",
        "tags": ["layerskip", "speculative-decoding", "self-speculative-decoding"],
    }
    metadata, _ = card_of(tmp_path, a_profile(model=replace(IDENTITY, id="/a/path")))
    assert "base_model" not in metadata


def test_the_card_has_the_measured_figures_with_the_machine_and_how_to_use_it(tmp_path):
    measured = MEASURED.model_copy(
        update={"device": "An accelerator", "versions": {"torch": "2.13.0", "python": "3.11"}}
    )
    _, text = card_of(tmp_path, published(some_weights(), measured=measured).for_base_model(BASE, "v2"))
    for words in [
        "**1.25×**",
        "1.20 to 1.30",
        "15.0 → 18.8 tokens/s",
        "75% of the drafted tokens were accepted",
        "On An accelerator in float32, over 8 prompts that the search did not use",
        "torch 2.13.0, python 3.11",
        "attn 1 · mlp 2 (2 of 8 sublayers)",
        "2 bridges; draft vocabulary of 3",
        "revision `v2`",
        "0123456789abcdef",
        "study nightly, trial 7",
        "load_profile('a-folder')",
        f"load_checkpoint('{BASE}', revision='v2')",
    ]:
        assert words in text


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        (None, "Its speed was not measured."),
        (MEASURED.model_copy(update={"speedup": 0.9}), "**That is slower than plain decoding.**"),
        (MEASURED.model_copy(update={"prompt_set": "search"}), "which is optimistic"),
        (MEASURED.model_copy(update={"acceptance_rate": None}), "nothing was drafted"),
    ],
)
def test_the_card_does_not_flatter(tmp_path, measured, words):
    assert words in card_of(tmp_path, published(measured=measured))[1]


def test_the_code_on_the_card_runs(tmp_path, llama, monkeypatch, capsys):
    full = tiny_llama(vocab_size=320)
    full.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    profile = a_profile(model=identify(LayerSkipModel(full), "./base"))
    _, text = card_of(tmp_path, profile)
    code = text.split("```python\n")[1].split("```")[0].replace("max_new_tokens=100", "max_new_tokens=20")
    exec(code, {})
    assert capsys.readouterr().out.strip()


# The Hub.


def test_a_profile_survives_the_way_to_the_hub_and_back(hub):
    profile = published(some_weights())
    address = push_profile(profile, "me/drafts")
    repository = hub.repositories["me/drafts"]
    assert address == f"{hub.url}/me/drafts/commit/{repository.branches['main']}"
    assert sorted(repository.files()) == sorted(
        [".gitattributes", "README.md", "draft_profile.json", profile.tensors.file]
    )
    assert repository.messages[-1] == "Upload draft profile"
    loaded = download_profile("me/drafts")
    assert loaded == profile.model_copy(update={"model": replace(IDENTITY, id=BASE)})
    assert same_weights(loaded, some_weights())
    assert "load_profile('me/drafts')" in repository.files()["README.md"].decode()


def test_a_name_without_an_owner_is_one_s_own(hub):
    push_profile(published(), "drafts")
    assert "load_profile('me/drafts')" in hub.repositories["me/drafts"].files()["README.md"].decode()


def test_a_model_s_own_repository_keeps_every_file_as_it_is(hub):
    files = {
        "config.json": b"{}",
        "README.md": b"---\nlicense: mit\n---\nThe model's.\n",
        "model.safetensors": b"weights",
    }
    repository = hub.add("tiny-models/base", files)
    profile = published(some_weights())
    push_profile(profile, "tiny-models/base")
    after = repository.files()
    assert {name: after[name] for name in files} == files
    assert after.keys() - files.keys() == {"draft_profile.json", profile.tensors.file}
    assert download_profile("tiny-models/base").tensors == profile.tensors


def test_the_card_on_the_hub_follows_the_profile_until_somebody_edits_it(hub):
    push_profile(published(), "me/drafts")
    push_profile(published(measured=MEASURED.model_copy(update={"speedup": 1.5})), "me/drafts")
    repository = hub.repositories["me/drafts"]
    assert b"**1.50" in repository.files()["README.md"]
    edited = repository.files()["README.md"] + b"More.\n"
    repository.commit("main", {"README.md": edited})
    push_profile(published(measured=None), "me/drafts")
    assert repository.files()["README.md"] == edited
    assert download_profile("me/drafts").measured is None


def test_a_revision_is_a_branch_to_push_to_and_to_read_from(hub):
    push_profile(published(target_confidence_threshold=0.1), "me/drafts")
    push_profile(published(target_confidence_threshold=0.2), "me/drafts", revision="next")
    push_profile(published(target_confidence_threshold=0.3), "me/drafts", revision="next")
    assert download_profile("me/drafts").target_confidence_threshold == 0.1
    assert download_profile("me/drafts", revision="next").target_confidence_threshold == 0.3


def test_profile_and_tensors_are_of_one_commit(hub, monkeypatch):
    old, new = (published(some_weights(seed)) for seed in (0, 1))
    push_profile(old, "me/drafts")
    repository = hub.repositories["me/drafts"]
    read = DraftProfile.read.__func__

    def read_while_somebody_pushes(cls, path, *, source):
        tree = {name: content for name, content in repository.files().items() if name != old.tensors.file}
        repository.commits["f" * 40], repository.branches["main"] = tree, "f" * 40
        return read(cls, path, source=source)

    monkeypatch.setattr(DraftProfile, "read", classmethod(read_while_somebody_pushes))
    assert same_weights(download_profile("me/drafts"), some_weights(0))
    assert new.tensors != old.tensors


def test_a_commit_of_somebody_else_in_the_meantime_is_not_written_over(hub):
    repository = hub.add("me/drafts", {"notes.txt": b"1"})
    hub.before_commit = lambda: repository.commit("main", {"README.md": b"Theirs."})
    with pytest.raises(HubError, match=r"^me/drafts: the Hub refuses: 412 Precondition Failed: A commit has happened"):
        push_profile(published(), "me/drafts")
    assert repository.files() == {"notes.txt": b"1", "README.md": b"Theirs."}


def test_a_profile_of_a_local_model_is_not_published_without_its_name(hub):
    local = a_profile(model=replace(IDENTITY, id="/home/me/models/secret"))
    with pytest.raises(
        InvalidInputError,
        match=r"^base model: the profile is for '/home/me/models/secret', which is on this machine only",
    ):
        push_profile(local, "me/drafts")
    assert hub.repositories == {}
    push_profile(local.for_base_model(BASE), "me/drafts")
    assert not any(b"secret" in content for content in hub.repositories["me/drafts"].files().values())


def test_a_private_repository_is_for_those_with_a_token(hub):
    push_profile(published(), "me/drafts", private=True, token=TOKEN)
    assert hub.repositories["me/drafts"].private
    assert "if it is private" in refused()
    assert download_profile("me/drafts", token=TOKEN).base_model_name_or_path == BASE


def test_what_was_fetched_once_is_there_without_the_hub(hub, offline):
    profile = published(some_weights())
    push_profile(profile, "me/drafts")
    download_profile("me/drafts")
    offline()
    hub.requests.clear()
    assert same_weights(download_profile("me/drafts"), some_weights())
    assert hub.requests == []


def test_the_base_model_s_revision_is_the_one_that_the_profile_is_for(hub, tmp_path):
    models = {branch: tiny_llama(vocab_size=320, seed=seed) for seed, branch in enumerate(["main", "v2"])}
    repository = hub.add(BASE, {})
    for branch, model in models.items():
        model.save_pretrained(tmp_path / branch)
        tiny_tokenizer().save_pretrained(tmp_path / branch)
        repository.commit(branch, contents(tmp_path / branch))
    profile = a_profile(model=identify(LayerSkipModel(models["v2"]), "/home/me/v2")).for_base_model(BASE, "v2")
    push_profile(profile, "me/drafts")
    fetched = download_profile("me/drafts")
    own, other = (
        LayerSkipModel(load_checkpoint(fetched.model.id, device="cpu", revision=revision).model)
        for revision in (fetched.revision, None)
    )
    assert fetched.check(own).fingerprint == fetched.model.fingerprint
    assert fetched.check(other).fingerprint != fetched.model.fingerprint


# What can go wrong, in one line.


def refused(name="me/drafts", **options):
    with pytest.raises(HubError) as error:
        download_profile(name, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_repository_is_named(hub):
    assert refused() == (
        "me/drafts: no such file or folder here, and no such repository on the Hub; if it is private, log in with "
        "'hf auth login'"
    )


def test_a_gated_repository_says_so(hub):
    hub.add("me/drafts", {"draft_profile.json": b"{}"}, gated=True)
    assert refused() == "me/drafts: gated; ask for access on its page on the Hub, then log in with 'hf auth login'"


def test_a_missing_revision_is_named(hub):
    hub.add("me/drafts", {"draft_profile.json": b"{}"})
    assert refused(revision="v9") == "me/drafts: the repository has no revision 'v9'"


def test_a_repository_without_a_profile_says_so(hub):
    hub.add("tiny-models/base", {"config.json": b"{}"})
    assert refused("tiny-models/base") == "tiny-models/base: the repository has no draft_profile.json"


def test_a_repository_without_the_profile_s_tensors_says_so(hub):
    profile = published(some_weights())
    push_profile(profile, "me/drafts")
    repository = hub.repositories["me/drafts"]
    hub.add("me/copy", {"draft_profile.json": repository.files()["draft_profile.json"]})
    assert refused("me/copy") == f"me/copy: the repository has no {profile.tensors.file}"


def test_being_offline_is_said(hub, offline):
    offline()
    assert refused() == "me/drafts: not in the cache, and HF_HUB_OFFLINE is set"


@pytest.fixture
def gone(tmp_path, monkeypatch):
    """The address of a hub that is not there any more."""
    with FakeHub().running() as hub:
        url = hub.url
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return url


@pytest.mark.slow  # the client tries for a while
def test_a_hub_that_is_away_is_named(gone):
    assert refused().startswith(f"me/drafts: {gone} cannot be reached")


def test_a_hub_that_is_away_takes_nothing(gone):
    with pytest.raises(HubError, match=f"^me/drafts: {gone} cannot be reached"):
        push_profile(published(), "me/drafts")


def test_a_repository_that_one_may_not_write_says_so(hub):
    hub.add("them/drafts", {}, locked=True)
    with pytest.raises(
        HubError, match=r"^them/drafts: the Hub refuses: 403 Forbidden: You don't have the rights to wri"
    ):
        push_profile(published(), "them/drafts")


@pytest.mark.parametrize("name", ["a/b/c", "", "with space", "--x"])
def test_a_name_that_is_none_is_refused_before_anything_is_sent(hub, name):
    with pytest.raises(InvalidInputError, match="expected owner/name"):
        push_profile(published(), name)
    assert hub.requests == []


def test_a_profile_on_the_hub_that_is_none_is_named_by_its_repository(hub):
    hub.add("me/drafts", {"draft_profile.json": b'{"version": 9}'})
    with pytest.raises(InvalidProfileError, match=r"^me/drafts/draft_profile\.json: "):
        download_profile("me/drafts")


def test_tensors_that_are_not_the_profile_s_are_refused(hub):
    profile = published(some_weights())
    push_profile(profile, "me/drafts")
    hub.repositories["me/drafts"].commit("main", {profile.tensors.file: b"other"})
    with pytest.raises(InvalidProfileError, match=r"^me/drafts/draft_profile\.json: tensors\.sha256: "):
        download_profile("me/drafts")


# As in a user's own program, which knows of the Hub by the environment alone.

PROGRAM = """
import sys
from layerskip import DraftProfile
from layerskip.hub import download_profile, push_profile
push_profile(DraftProfile.load(sys.argv[1]), "me/drafts")
download_profile("me/drafts").save(sys.argv[2])
"""


@pytest.mark.slow
def test_a_program_of_its_own_pushes_and_fetches(tmp_path):
    profile = published(some_weights(), model=replace(IDENTITY, id=BASE))
    profile.save(tmp_path / "one.json")
    with FakeHub().running() as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        environment = os.environ | settings | {"HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", PROGRAM, tmp_path / "one.json", tmp_path / "other.json"]
        subprocess.run(command, check=True, env=environment, timeout=120)
    assert (tmp_path / "other.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    assert DraftProfile.load(tmp_path / "other.json") == profile
