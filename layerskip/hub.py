"""Draft profiles by name: in folders and in repositories on the Hugging Face Hub, by the conventions of PEFT.

A profile has a file name of its own, so that it can share a folder or a repository with a model, whose files are never
written. That is why ``huggingface_hub.ModelHubMixin``, which overwrites ``config.json``, and the ``push_to_hub`` of
transformers' ``PushToHubMixin``, which overwrites ``README.md``, are not used.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils.hub import extract_commit_hash

from layerskip.checks import shown
from layerskip.errors import HubError, InvalidInputError, InvalidProfileError, first_line
from layerskip.names import ALIASES
from layerskip.profile import PROFILE_NAME, DraftProfile, Measured
from layerskip.ready_profiles import find_profile
from layerskip.utils import write_atomically

CARD_NAME = "README.md"

_TAGS = ["layerskip", "speculative-decoding", "self-speculative-decoding"]
_MARK = "<!-- Written by layerskip. sha256 of the text above: {}. A card that somebody changed is left alone. -->\n"
_MARKED = re.compile(r"(?s)(?P<text>.*)" + re.escape(_MARK).replace(r"\{\}", r"(?P<checksum>[0-9a-f]{64})"))
# Files of a folder or a repository that holds a model or an adapter.
_MODEL_FILES = {"config.json", "adapter_config.json", "params.json"}
_MODEL_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".onnx")
_OWN_TENSORS = re.compile(r"draft-[0-9a-f]{16}\.safetensors")
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_NEW_REPOSITORY = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
# httpx's or httpx2's, by the version of huggingface_hub: a connection that fails, a time limit.
_TransportError = cast("type[Exception]", HfHubHTTPError.__bases__[0])


def load_profile(source: str | Path, *, device: str = "auto", dtype: str = "auto") -> DraftProfile:
    """Load a profile by its file, by the name of a ready one, or from the Hub.

    Args:
        source: A file, or a folder that holds a ``draft_profile.json``; the name of a ready profile; or else
            ``owner/name``, a repository on the Hub.
        device: As in :func:`layerskip.ready_profiles.find_profile`.
        dtype: Likewise.

    Raises:
        InvalidProfileError: There is no such profile, or it is not valid.
        InvalidInputError: The device or dtype is unknown or not available.
        HubError: The repository cannot be downloaded.
    """
    path, name = Path(source).expanduser(), str(source)
    try:
        has_one = path.is_file() or (path / PROFILE_NAME).is_file()
    except (OSError, ValueError) as error:  # a name that no file can have, or a folder that may not be read
        raise InvalidProfileError(f"{shown(name)}: cannot read the draft profile: {first_line(error)}") from error
    if path.suffix == ".gguf" or ((path / "config.json").is_file() and not has_one):
        raise InvalidProfileError(
            f"{source}: is a model, and not a draft profile; make one with 'layerskip search {source}'"
        )
    if is_repository(name) and not path.exists():
        return download_profile(name)
    if has_one or path.suffix == ".json" or "/" in name:
        return DraftProfile.load(path)
    return DraftProfile.load(find_profile(name, device=device, dtype=dtype))


def download_profile(
    repo_id: str,
    *,
    revision: str | None = None,
    subfolder: str = "",
    cache_dir: str | Path | None = None,
    token: bool | str | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> DraftProfile:
    """Download the ``draft_profile.json`` of a repository on the Hub, with its tensors.

    Args:
        repo_id: The repository, ``owner/name``.
        revision: Its branch, tag or commit; None takes its default branch. Profile and tensors come from the same
            commit.
        subfolder: Folder inside the repository.
        cache_dir: Where downloads are kept; None takes the Hub's own cache.
        token: Token for private and gated repositories; None takes the one of ``hf auth login``.
        force_download: Download again what the cache has.
        local_files_only: Look only into the cache.

    Raises:
        InvalidProfileError: It is not a valid profile. The message names the repository, the field and what was
            expected.
        HubError: The repository, its revision or its file is missing or cannot be downloaded.
    """
    fetch = partial(
        hf_hub_download,
        repo_id,
        subfolder=subfolder or None,
        cache_dir=cache_dir,
        token=token,
        force_download=force_download,
        local_files_only=local_files_only,
        library_name="layerskip",
    )
    with _hub_errors(repo_id, revision):
        path = Path(fetch(PROFILE_NAME, revision=revision))
    profile = DraftProfile.read(path, source=f"{repo_id}/{PROFILE_NAME}")
    if profile.tensors is not None:
        commit = extract_commit_hash(str(path), None)
        with _hub_errors(repo_id, revision, file=profile.tensors.file):
            fetch(profile.tensors.file, revision=commit)
    return profile.with_tensors(path.parent)


def save_profile(profile: DraftProfile, folder: str | Path) -> None:
    """Write ``draft_profile.json``, its tensors and a model card into a folder.

    Nothing else in the folder changes. The card, ``README.md``, is written if there is none or if layerskip wrote it
    and it was not edited since, and never into a folder that holds a model.

    Args:
        profile: The profile.
        folder: The folder; created if missing.

    Raises:
        InvalidProfileError: The folder cannot be written.
    """
    profile, folder = with_hub_name(profile), Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidProfileError(f"{folder}: cannot write the draft profile: {error.strerror}") from error
    profile.save(folder / PROFILE_NAME)
    path = folder / CARD_NAME
    try:
        files = {file.name for file in folder.iterdir()}
        card = path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
        if _may_write_card(files, card):
            write_atomically(path, card_of(profile, folder.resolve().name))
    except OSError as error:
        raise InvalidProfileError(f"{path}: cannot write the model card: {error.strerror}") from error


def push_profile(
    profile: DraftProfile,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Commit ``draft_profile.json``, its tensors and a model card to a repository on the Hub.

    Nothing else in the repository changes. It may be a model's own; the card is then left out, and so it is where
    somebody wrote or edited one. If somebody else commits in the meantime, nothing is written.

    Args:
        profile: The profile.
        repo_id: The repository, ``owner/name``; created if missing. A name alone is a repository of your own.
        commit_message: Title of the commit.
        commit_description: Its description.
        private: Whether a new repository is private; None leaves it to the owner's settings.
        token: Token to use; None takes the one of ``hf auth login``.
        revision: Branch to commit to; created if missing. None takes the default branch.
        create_pr: Open a pull request instead.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        InvalidInputError: The profile does not name its model on the Hub, see :meth:`DraftProfile.for_base_model`.
        HubError: The Hub cannot be reached or refuses.
    """
    profile = with_hub_name(profile)
    if profile.base_model_name_or_path is None:
        raise InvalidInputError(
            f"base model: the profile is for '{profile.model.id}', which is on this machine only; give the name of the "
            "model on the Hub (--base-model, or profile.for_base_model)"
        )
    if not _NEW_REPOSITORY.fullmatch(repo_id):
        raise InvalidInputError(f"repository '{repo_id}': expected owner/name")
    api = HfApi(token=token, library_name="layerskip")
    with _hub_errors(repo_id, revision):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.model_info(repo_id, revision=revision)
        files = [sibling.rfilename for sibling in before.siblings or []]
        card = _remote_card(api, repo_id, before.sha) if CARD_NAME in files else None
        contents = {PROFILE_NAME: profile.to_json().encode()}
        if profile.tensors is not None:
            contents[profile.tensors.file] = profile.tensors_bytes()
        if _may_write_card(files, card):
            contents[CARD_NAME] = card_of(profile, repo_id).encode()
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(path, content) for path, content in contents.items()],
            commit_message=commit_message or "Upload draft profile",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=before.sha,
        )
    return str(commit.pr_url or commit.commit_url)


def _remote_card(api: HfApi, repo_id: str, commit: str | None) -> str:
    path = Path(api.hf_hub_download(repo_id, CARD_NAME, revision=commit))
    return path.read_text(encoding="utf-8", errors="replace")


def is_repository(name: str) -> bool:
    """Whether a name has the form of a repository's, ``owner/name``, and not that of a file's."""
    return _REPOSITORY.fullmatch(name) is not None and not name.endswith((".json", ".gguf"))


def with_hub_name(profile: DraftProfile) -> DraftProfile:
    """The profile with its model's name on the Hub, as far as it is known, instead of a path on this machine."""
    base, id = profile.base_model_name_or_path, profile.model.id
    if id in ALIASES:
        return profile.for_base_model(base or ALIASES[id].hub_id, profile.revision)
    if is_repository(id) and not Path(id).exists():
        return profile.for_base_model(base or id, profile.revision)
    if base is None:
        return profile
    return profile.model_copy(update={"model": replace(profile.model, id=base)})


def card_of(profile: DraftProfile, name: str) -> str:
    """The model card of a profile, in Markdown with YAML metadata.

    Args:
        profile: The profile.
        name: What :func:`load_profile` takes: a repository on the Hub, or a folder's name.
    """
    base = profile.base_model_name_or_path
    model = f"[{base}](https://huggingface.co/{base})" if base else profile.model.id
    draft = "small heads on its hidden states" if profile.drafts_with_heads else "all but the sublayers named below"
    sections = [
        f"---\n{card_metadata(base)}\n---",
        f"# A draft profile for {base or profile.model.id}",
        f"{model} can draft for itself: with layerskip, {draft} propose a few tokens, and the target model verifies "
        "them. The output is that of the model.",
        _table(profile),
        measured_in_words(profile.measured),
        "## Use",
        _usage(profile, name),
    ]
    return _marked("\n\n".join(sections) + "\n\n")


def card_metadata(base: str | None, *, library: str = "layerskip") -> str:
    """The card's YAML: ``base_model`` (where it is known), ``library_name``, ``pipeline_tag`` and ``tags``."""
    data = ModelCardData(base_model=base, library_name=library, pipeline_tag="text-generation", tags=_TAGS)
    yaml: str = data.to_yaml()
    return yaml


def measured_in_words(measured: Measured | None) -> str:
    """What was measured, with the machine and the circumstances."""
    if measured is None:
        return "Its speed was not measured."
    rate = measured.acceptance_rate
    accepted = "nothing was drafted" if rate is None else f"{rate:.0%} of the drafted tokens were accepted"
    prompts = {
        "held-out": "that the search did not use",
        "search": "that the search itself optimized for, which is optimistic",
    }
    versions = ", ".join(f"{name} {version}" for name, version in measured.versions.items())
    words = (
        f"Measured: **{measured.speedup:.2f}×** the speed of plain decoding (95 % interval: "
        f"{measured.speedup_low:.2f} to {measured.speedup_high:.2f}), {measured.plain_tokens_per_second:.1f} → "
        f"{measured.speculative_tokens_per_second:.1f} tokens/s; {accepted}. On {measured.device} in {measured.dtype}, "
        f"over {measured.prompts} prompts {prompts[measured.prompt_set]}, of at most {measured.max_new_tokens} new "
        f"tokens each, with {versions}. Other machines and prompts differ: measure again."
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


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _usage(profile: DraftProfile, name: str) -> str:
    revision = f", revision={profile.revision!r}" if profile.revision else ""
    return f"""```python
from layerskip import LayerSkipModel, generate, load_checkpoint, load_profile

checkpoint = load_checkpoint({profile.model.id!r}{revision})
model = LayerSkipModel(checkpoint.model)
drafter = load_profile({name!r}).drafter(model)
generation = generate(model, checkpoint.tokenizer("Once upon a time").input_ids, drafter=drafter, max_new_tokens=100)
print(checkpoint.tokenizer.decode(generation.tokens))
```"""


def _marked(text: str) -> str:
    return text + _MARK.format(hashlib.sha256(text.encode()).hexdigest())


def _may_write_card(files: Collection[str], card: str | None) -> bool:
    """Whether a card may be written: never over somebody's own, and not into a model's own folder or repository.

    Args:
        files: Names of the files that are there.
        card: The text of the card that is there, if one is.
    """
    marked = None if card is None else _MARKED.fullmatch(card)
    unedited = marked is not None and card == _marked(marked["text"])
    return not _holds_a_model(files) and (card is None or unedited)


def _holds_a_model(files: Collection[str]) -> bool:
    return any(
        name in _MODEL_FILES or (name.endswith(_MODEL_SUFFIXES) and not _OWN_TENSORS.fullmatch(name)) for name in files
    )


@contextmanager
def _hub_errors(repo_id: str, revision: str | None, *, file: str = PROFILE_NAME) -> Iterator[None]:
    """Turn what the Hub's client raises into one line that names the repository."""
    try:
        yield
    except GatedRepoError as error:
        raise HubError(
            f"{repo_id}: gated; ask for access on its page on the Hub, then log in with 'hf auth login'"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{repo_id}: no such file or folder here, and no such repository on the Hub; if it is private, log in "
            "with 'hf auth login'"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo_id}: the repository has no revision '{revision}'") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise HubError(f"{repo_id}: {_why_not_reached(error)}") from error
    except EntryNotFoundError as error:
        raise HubError(f"{repo_id}: the repository has no {file}") from error
    except HfHubHTTPError as error:
        raise HubError(f"{repo_id}: the Hub refuses: {_refusal(error)}") from error
    except _TransportError as error:
        raise HubError(f"{repo_id}: {_why_not_reached(error)}") from error
    except (ValueError, RuntimeError) as error:  # a name, an answer or an upload that is not as it should be
        raise HubError(f"{repo_id}: {first_line(error)}") from error
    except OSError as error:
        raise HubError(f"{repo_id}: {error.strerror or first_line(error)}: {error.filename or 'cache'}") from error


def _why_not_reached(error: BaseException) -> str:
    if constants.HF_HUB_OFFLINE:
        return "not in the cache, and HF_HUB_OFFLINE is set"
    cause = error.__cause__ or error
    if isinstance(cause, HfHubHTTPError):
        return f"not in the cache, and the Hub refuses: {_refusal(cause)}"
    return f"{constants.ENDPOINT} cannot be reached, and the cache does not help: {first_line(cause)}"


def _refusal(error: HfHubHTTPError) -> str:
    reason = f"{error.response.status_code} {error.response.reason_phrase}"
    if error.server_message:
        reason += f": {error.server_message.splitlines()[0]}"
    if error.response.status_code in (401, 403):
        reason += "; log in with 'hf auth login', with a token that may write"
    return reason
