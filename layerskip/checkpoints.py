"""Load models: from a Hub id, a local folder, a GGUF file or an alias."""

from __future__ import annotations

import difflib
import logging
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from layerskip.attention_masks import needed_attention
from layerskip.checks import instance, shown
from layerskip.errors import CheckpointError, InvalidInputError, first_line
from layerskip.gguf_conversion import converted
from layerskip.names import ALIASES, DTYPES

logger = logging.getLogger(__name__)

_GGUF = ".gguf"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model with its tokenizer.

    Args:
        source: The alias, path or Hub id that it was loaded by.
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
    """

    source: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_checkpoint(
    source: str, *, device: str = "auto", dtype: str = "auto", revision: str | None = None
) -> Checkpoint:
    """Load a model and its tokenizer. Nothing is unpickled and no remote code runs.

    Args:
        source: An alias (``smollm2``), a path to a ``.gguf`` file, a folder in Hugging Face format, or a Hub id.
            A GGUF file is converted once, into :func:`cache_folder`.
        device: A torch device; ``auto`` is the first CUDA device, or else the CPU.
        dtype: ``float32``, ``bfloat16`` or ``float16``; ``auto`` is bfloat16 on CUDA and float32 elsewhere.
        revision: Branch, tag or commit on the Hub; None is the default branch. Local models have none.

    Raises:
        CheckpointError: The model cannot be found or loaded.
        InvalidInputError: The device or dtype is unknown or not available.
        MissingDependencyError: The ``gguf`` extra is needed and not installed.
    """
    if not isinstance(source, str | os.PathLike):
        raise InvalidInputError(f"model: expected a name or a path, got {shown(source)}")
    source = os.fspath(source)
    torch_device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, torch_device)
    location = locate(source)
    if is_gguf(location):
        location = str(converted(Path(location), torch_dtype, cache_folder()))
    revision = revision or "main"
    _check_hub(source, location, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, revision=revision, trust_remote_code=False)
        config = AutoConfig.from_pretrained(location, revision=revision, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location,
            revision=revision,
            dtype=torch_dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
            **needed_attention(config),
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise _load_error(source, location, error) from error
    model, loading_info = loaded
    _check_weights(source, loading_info)
    model.to(torch_device)
    model.eval()
    return Checkpoint(source, model, tokenizer)


def _check_weights(source: str, loading_info: dict[str, Any]) -> None:
    """Raise a :class:`CheckpointError` if any weight was left at random, of which transformers only warns."""
    if missing := sorted(loading_info["missing_keys"]):
        raise CheckpointError(f"model '{source}': its files lack {_first_of(missing)}; download them again")
    if mismatched := sorted(name for name, *_ in loading_info["mismatched_keys"]):
        raise CheckpointError(
            f"model '{source}': {_first_of(mismatched)} in its files does not have the shape that its config.json "
            "requires; download them again"
        )


def _first_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def stored_dtype(source: str, *, revision: str | None = None) -> str:
    """The name of the floating-point type that a model's weights are stored in; ``float32`` for GGUF files.

    Args:
        source: As in :func:`load_checkpoint`.
        revision: As in :func:`load_checkpoint`.

    Raises:
        CheckpointError: The model cannot be found.
    """
    location = locate(source)
    if is_gguf(location):
        return "float32"
    try:
        config = AutoConfig.from_pretrained(location, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _load_error(source, location, error) from error
    name = str(config.dtype).removeprefix("torch.")
    return name if name in DTYPES else "float32"


def resolve_device(name: str) -> torch.device:
    """The torch device of a name; ``auto`` is the first CUDA device, or else the CPU.

    Raises:
        InvalidInputError: There is no such device, or it is not available here.
    """
    if isinstance(name, torch.device):
        name = str(name)
    instance("device", name, str)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unavailable = f"device '{name}' is not available"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidInputError(f"{unavailable}: expected auto, cpu, cuda or cuda:N") from error
    if device.type == "meta":  # torch has it, but nothing can be computed there
        raise InvalidInputError(f"{unavailable}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (reason := _why_no_cuda(device.index or 0)):
        raise InvalidInputError(f"{unavailable}: {reason}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InvalidInputError(f"{unavailable}: {first_line(error)}") from error
    return device


def _why_no_cuda(index: int) -> str | None:
    """Why there is no CUDA device of this index; None if there is."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch is built for the CPU only; install a build for CUDA, or use cpu"
    if not torch.cuda.is_available():
        return "no GPU with a working driver was found (nvidia-smi lists them); use cpu"
    count = torch.cuda.device_count()
    return f"the last GPU here is cuda:{count - 1}" if index >= count else None


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a name; ``auto`` is bfloat16 on CUDA and float32 elsewhere.

    Raises:
        InvalidInputError: The name is unknown.
    """
    instance("dtype", name, str)
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise InvalidInputError(f"dtype '{name}' is unknown; expected auto, {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def cache_folder() -> Path:
    """The folder for converted models, costs and texts: ``$LAYERSKIP_CACHE``, or ``layerskip`` in the user's cache."""
    own = os.environ.get("LAYERSKIP_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerskip"


def is_gguf(location: str) -> bool:
    """Whether a model's location, as :func:`locate` gives it, is a GGUF file."""
    return Path(location).suffix.lower() == _GGUF and Path(location).is_file()


def locate(source: str) -> str:
    """The folder, GGUF file or Hub id of a model."""
    alias = ALIASES.get(source)
    if alias is not None:
        package = find_spec(alias.package)
        folders = package.submodule_search_locations if package else None
        shipped = Path(folders[0]) / alias.file if folders else None
        return str(shipped) if shipped is not None and shipped.is_file() else alias.hub_id
    path = Path(source).expanduser()
    try:
        return _located(source, path)
    except PermissionError as error:
        raise CheckpointError(f"model '{source}': {error.strerror}: {error.filename}") from error
    except (OSError, ValueError) as error:  # a name that no file can have
        raise CheckpointError(f"model {shown(source)}: {first_line(error)}") from error


def _located(source: str, path: Path) -> str:
    if path.suffix.lower() == _GGUF and not path.is_dir():
        if not path.is_file():
            raise CheckpointError(f"model '{source}': no such file{_suggestion(source)}")
        return str(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"model '{source}': the folder has no config.json; expected a Hugging Face model")
        return str(path)
    if path.is_file():
        raise CheckpointError(f"model '{source}': expected a .gguf file or a folder, found another kind of file")
    if source.startswith((".", "/", "~")):
        raise CheckpointError(f"model '{source}': no such file or folder{_suggestion(source)}")
    logger.info("model '%s': no local folder, loading it from the Hub or its cache", source)
    return source


def _check_hub(source: str, location: str, revision: str) -> None:
    """Raise a :class:`CheckpointError` at once if the Hub is needed and unreachable: its client retries for long."""
    if Path(location).exists() or constants.HF_HUB_OFFLINE:
        return
    try:
        if try_to_load_from_cache(location, "config.json", revision=revision) is None:
            get_hf_file_metadata(hf_hub_url(location, "config.json", revision=revision))
    except (HfHubHTTPError, HFValidationError):  # the Hub answered; loading the model reports what is wrong
        return
    except Exception as error:  # depends on the library that the Hub's client connects with
        reason = f"{constants.ENDPOINT} cannot be reached ({first_line(error)}): is there a network?"
        raise _not_found(source, f": {reason}") from error


def _load_error(source: str, location: str, error: Exception) -> CheckpointError:
    """Why a model did not load, in one line."""
    if Path(location).exists():
        return CheckpointError(f"model '{source}': {first_line(error)}")
    return _not_found(source, " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else f": {first_line(error)}")


def _not_found(source: str, why: str) -> CheckpointError:
    """The error for a model that is neither here nor on the Hub, with a similar name if there is one."""
    alias = ALIASES.get(source)
    if alias is not None:
        return CheckpointError(
            f"model '{source}': the package '{alias.package}' is not installed, and {alias.hub_id} was not found on "
            f"the Hub{why}"
        )
    return CheckpointError(
        f"model '{source}': not an alias ({', '.join(ALIASES)}), not a local file or folder, and not found on the "
        f"Hub{why}{_suggestion(source)}"
    )


def _suggestion(source: str) -> str:
    """A question about the alias, or the model in the same folder, whose name is most similar; empty without one."""
    folder = Path(source).expanduser().parent
    try:
        nearby = [
            str(path) for path in folder.iterdir() if path.suffix.lower() == _GGUF or (path / "config.json").is_file()
        ]
    except OSError:
        nearby = []
    known = [*ALIASES, *(alias.hub_id for alias in ALIASES.values()), *nearby]
    similar = difflib.get_close_matches(source, known, n=1)
    return f"; did you mean '{similar[0]}'?" if similar else ""
