"""Draft profiles in folders and in repositories on the Hugging Face Hub, by the conventions of PEFT.

A profile lies under a file name of its own, so that it can share a folder or a repository with a model, whose files are
never written. That is why ``huggingface_hub.ModelHubMixin``, which writes ``config.json`` anew, and the ``push_to_hub``
of transformers' ``PushToHubMixin``, which writes ``README.md`` anew, are not used.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

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

from layerskip.errors import HubError, InvalidInputError, InvalidProfileError, first_line
from layerskip.names import ALIASES
from layerskip.utils import write_atomically

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
        f"{_of(base) or profile.model.id} can draft for itself: {_how(profile)} and verifies them with the target. "
        "The output is that of the target model.",
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


PROFILE_NAME = "draft_profile.json"

# httpx's or httpx2's, by the version of huggingface_hub: a connection that fails, a time limit.
_TransportError = cast("type[Exception]", HfHubHTTPError.__bases__[0])
_NAMED = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_PARTS = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)


class OnTheHub:
    """What makes a draft profile an artifact of the hub; a part of :class:`layerskip.DraftProfile`."""

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        subfolder: str = "",
        cache_dir: str | Path | None = None,
        token: bool | str | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> DraftProfile:
        """Read the ``draft_profile.json`` of a folder or of a repository on the hub, with its tensors.

        Args:
            name_or_path: A folder, a profile's own file, or a repository on the hub (``owner/name``).
            revision: The repository's branch, tag or commit; None takes its default branch. Profile and tensors come
                from the same commit.
            subfolder: Folder inside the folder or repository.
            cache_dir: Where downloads are kept; None takes the hub's own cache.
            token: Token for private and gated repositories; None takes the one of ``hf auth login``.
            force_download: Download again what the cache has.
            local_files_only: Look only into the cache.

        Raises:
            InvalidProfileError: There is no such file, or it is not a valid profile. The message names the file or the
                repository, the field and what was expected.
            HubError: The repository, its revision or its file cannot be had.
        """
        profile_class = cast("type[DraftProfile]", cls)
        path = Path(name_or_path).expanduser()
        if path.is_dir():
            return profile_class.load(path / subfolder / PROFILE_NAME)
        name = str(name_or_path)
        if path.is_file() or not is_repository(name):
            return profile_class.load(path)
        fetch = partial(
            hf_hub_download,
            name,
            subfolder=subfolder or None,
            cache_dir=cache_dir,
            token=token,
            force_download=force_download,
            local_files_only=local_files_only,
            library_name="layerskip",
        )
        return _fetched(profile_class, name, fetch, revision)

    def save_pretrained(
        self, save_directory: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None, **kwargs: Any
    ) -> None:
        """Write ``draft_profile.json``, its tensors and a model card into a folder.

        Nothing else in the folder changes. The card, ``README.md``, is written where none is or where this wrote it
        and nobody changed it since, and never into a folder that holds a model.

        Args:
            save_directory: The folder; made if it is missing.
            push_to_hub: Also call :meth:`push_to_hub`.
            repo_id: The repository for that; None takes the folder's name.
            kwargs: Passed on to :meth:`push_to_hub`.

        Raises:
            InvalidProfileError: The folder cannot be written.
            HubError: See :meth:`push_to_hub`.
        """
        profile, folder = published(cast("DraftProfile", self)), Path(save_directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidProfileError(f"{folder}: cannot write the draft profile: {error.strerror}") from error
        profile.save(folder / PROFILE_NAME)
        _write_card(profile, folder)
        if push_to_hub:
            profile.push_to_hub(repo_id or folder.resolve().name, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Commit ``draft_profile.json``, its tensors and a model card to a repository on the hub.

        Nothing else in the repository changes. It may be a model's own; the card is then left out, and so it is where
        somebody wrote or changed one. Where somebody else commits in the meantime, nothing is written.

        Args:
            repo_id: The repository, ``owner/name``; made if it is missing. A name alone is one of your own.
            commit_message: Title of the commit.
            commit_description: Its description.
            private: Whether a new repository is private; None leaves it to the owner's settings.
            token: Token to use; None takes the one of ``hf auth login``.
            revision: Branch to commit to; made if it is missing. None takes the default branch.
            create_pr: Open a pull request instead.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            InvalidInputError: The profile does not say which model on the hub it is for, see :meth:`for_base_model`.
            HubError: The hub cannot be reached or refuses.
        """
        profile = published(cast("DraftProfile", self))
        if profile.base_model_name_or_path is None:
            raise InvalidInputError(
                f"base model: the profile is for '{profile.model.id}', which lies on this machine only; say what it is "
                "called on the hub (--base-model, or profile.for_base_model)"
            )
        if not _PARTS.fullmatch(repo_id):
            raise InvalidInputError(f"repository '{repo_id}': expected owner/name")
        api = HfApi(token=token, library_name="layerskip")
        with _hub_errors(repo_id, revision):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            before = api.model_info(repo_id, revision=revision)
            files = [sibling.rfilename for sibling in before.siblings or []]
            card = _remote_card(api, repo_id, before.sha) if CARD_NAME in files else None
            commit = api.create_commit(
                repo_id,
                [
                    CommitOperationAdd(path, content)
                    for path, content in _contents(profile, repo_id, files, card).items()
                ],
                commit_message=commit_message or "Upload draft profile",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                parent_commit=before.sha,
            )
        return str(commit.pr_url or commit.commit_url)

    def for_base_model(self, name_or_path: str, revision: str | None = None) -> DraftProfile:
        """The same profile, said to be for a model on the hub, to publish it.

        Args:
            name_or_path: The model, as ``AutoModelForCausalLM.from_pretrained`` takes it.
            revision: Its branch, tag or commit; None takes its default branch.
        """
        named = {"base_model_name_or_path": name_or_path, "revision": revision}
        return cast("DraftProfile", self).model_copy(update=named)


def is_repository(name: str) -> bool:
    """Whether a name has the form of a repository's, ``owner/name``, and not that of a file's."""
    return _NAMED.fullmatch(name) is not None and not name.endswith((".json", ".gguf"))


def published(profile: DraftProfile) -> DraftProfile:
    """The profile with its model's name on the hub, as far as it is known, instead of a path on this machine."""
    base = profile.base_model_name_or_path
    if profile.model.id in ALIASES:
        return profile.for_base_model(base or ALIASES[profile.model.id].hub_id, profile.revision)
    if _is_elsewhere(profile.model.id):
        return profile.for_base_model(base or profile.model.id, profile.revision)
    if base is None:
        return profile
    return profile.model_copy(update={"model": replace(profile.model, id=base)})


def _is_elsewhere(id: str) -> bool:
    return is_repository(id) and not Path(id).exists()


def _fetched(
    profile_class: type[DraftProfile], repo_id: str, fetch: Callable[..., str], revision: str | None
) -> DraftProfile:
    """A profile of the hub with its tensors, both of one commit."""
    with _hub_errors(repo_id, revision):
        path = Path(fetch(PROFILE_NAME, revision=revision))
    profile = profile_class._read(path, source=f"{repo_id}/{PROFILE_NAME}")
    if profile.tensors is not None:
        commit = extract_commit_hash(str(path), None)
        with _hub_errors(repo_id, revision, file=profile.tensors.file):
            fetch(profile.tensors.file, revision=commit)
    profile._tensors = profile._load_tensors(path.parent)
    return profile


def _contents(profile: DraftProfile, repo_id: str, files: list[str], card: str | None) -> dict[str, bytes]:
    """What to commit, by path."""
    contents = {PROFILE_NAME: profile.to_json().encode()}
    if profile.tensors is not None:
        contents[profile.tensors.file] = profile.tensors_bytes()
    if card_is_welcome(files, card):
        contents[CARD_NAME] = card_of(profile, repo_id).encode()
    return contents


def _remote_card(api: HfApi, repo_id: str, commit: str | None) -> str:
    path = Path(api.hf_hub_download(repo_id, CARD_NAME, revision=commit))
    return path.read_text(encoding="utf-8", errors="replace")


def _write_card(profile: DraftProfile, folder: Path) -> None:
    path = folder / CARD_NAME
    try:
        files = {path.name for path in folder.iterdir()}
        card = path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
        if card_is_welcome(files, card):
            write_atomically(path, card_of(profile, folder.resolve().name))
    except OSError as error:
        raise InvalidProfileError(f"{path}: cannot write the model card: {error.strerror}") from error


@contextmanager
def _hub_errors(repo_id: str, revision: str | None, *, file: str = PROFILE_NAME) -> Iterator[None]:
    """Turn what the hub's client raises into one line that names the repository."""
    try:
        yield
    except GatedRepoError as error:
        raise HubError(
            f"{repo_id}: gated; ask for access on its page on the hub, then log in with 'hf auth login'"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{repo_id}: no such file or folder here, and no such repository on the hub; if it is private, log in "
            "with 'hf auth login'"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo_id}: the repository has no revision '{revision}'") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise HubError(f"{repo_id}: {_why_not_reached(error)}") from error
    except EntryNotFoundError as error:
        raise HubError(f"{repo_id}: the repository has no {file}") from error
    except HfHubHTTPError as error:
        raise HubError(f"{repo_id}: the hub refuses: {_said(error)}") from error
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
        return f"not in the cache, and the hub refuses: {_said(cause)}"
    return f"{constants.ENDPOINT} cannot be reached, and the cache does not help: {first_line(cause)}"


def _said(error: HfHubHTTPError) -> str:
    said = f"{error.response.status_code} {error.response.reason_phrase}"
    if error.server_message:
        said += f": {error.server_message.splitlines()[0]}"
    if error.response.status_code in (401, 403):
        said += "; log in with 'hf auth login', with a token that may write"
    return said
