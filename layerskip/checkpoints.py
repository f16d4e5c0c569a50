"""Where models come from: a hub id, a local folder, a GGUF file, or a built-in alias."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import shutil
import struct
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from layerskip.errors import CheckpointError, InvalidInputError, MissingDependencyError
from layerskip.names import ALIASES, DTYPES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model.

    Args:
        source: What the user called it.
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
        source: An alias (``smollm2``), a path to a ``.gguf`` file, a folder in Hugging Face format, or a hub id.
            A GGUF file is converted once and the copy kept in :func:`cache_folder`.
        device: A torch device; ``auto`` takes the first CUDA device, or else the CPU.
        dtype: ``float32``, ``bfloat16`` or ``float16``; ``auto`` takes bfloat16 on CUDA and float32 elsewhere.
        revision: Branch, tag or commit on the hub; None takes its default branch. Local models have none.

    Raises:
        CheckpointError: The model cannot be found or loaded.
        InvalidInputError: The device or dtype is unknown or not available.
        MissingDependencyError: The ``gguf`` extra is needed and not installed.
    """
    where = resolve_device(device)
    precision = resolve_dtype(dtype, where)
    location = _locate(source)
    if location.endswith(".gguf"):
        location = str(_converted(Path(location), precision))
    at = revision or "main"
    _check_hub(source, location, at)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, revision=at, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location,
            revision=at,
            dtype=precision,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise CheckpointError(f"model '{source}': {_why(source, location, error)}") from error
    model, found = loaded
    _check_weights(source, found)
    model.to(where)
    model.eval()
    return Checkpoint(source, model, tokenizer)


def _check_weights(source: str, found: dict[str, Any]) -> None:
    """Make sure that no weight is left random, which transformers only mentions.

    Raises:
        CheckpointError: One is.
    """
    missing, mismatched = sorted(found["missing_keys"]), sorted(found["mismatched_keys"])
    if missing:
        raise CheckpointError(f"model '{source}': its files lack {_first_of(missing)}; get them again")
    if mismatched:
        names = [name for name, *_ in mismatched]
        raise CheckpointError(
            f"model '{source}': {_first_of(names)} in its files is not of the shape that its config.json asks for; get "
            "them again"
        )


def _first_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def stored_dtype(source: str, *, revision: str | None = None) -> str:
    """The name of the floating-point type that a model's weights are stored in; ``float32`` for quantized GGUF files.

    Args:
        source: As :func:`load_checkpoint` takes it.
        revision: Likewise.

    Raises:
        CheckpointError: The model cannot be found.
    """
    location = _locate(source)
    if location.endswith(".gguf"):
        return "float32"
    try:
        config = AutoConfig.from_pretrained(location, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"model '{source}': {_why(source, location, error)}") from error
    name = str(config.dtype).removeprefix("torch.")
    return name if name in DTYPES else "float32"


def resolve_device(name: str) -> torch.device:
    """The torch device of a name; ``auto`` is the first CUDA device, or else the CPU.

    Raises:
        InvalidInputError: No such device, or it is not available here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidInputError(f"device '{name}' is not available: expected auto, cpu, cuda or cuda:N") from error
    if device.type == "meta":  # torch has it, but nothing can be computed there
        raise InvalidInputError(f"device '{name}' is not available: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        _check_cuda(name, device.index or 0)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InvalidInputError(f"device '{name}' is not available: {reason}") from error
    return device


def _check_cuda(name: str, index: int) -> None:
    """Make sure that there is such a CUDA device, and say what is missing if not."""
    if torch.version.cuda is None and torch.version.hip is None:
        reason = "this PyTorch is built for the CPU alone; install one that is built for CUDA, or use cpu"
    elif not torch.cuda.is_available():
        reason = "no GPU with a working driver was found (nvidia-smi lists them); use cpu"
    elif index >= (count := torch.cuda.device_count()):
        reason = f"the last GPU here is cuda:{count - 1}"
    else:
        return
    raise InvalidInputError(f"device '{name}' is not available: {reason}")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a name; ``auto`` is bfloat16 on CUDA and float32 elsewhere.

    Raises:
        InvalidInputError: Not one of the known names.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise InvalidInputError(f"dtype '{name}' is unknown; expected auto, {', '.join(DTYPES)}")
    precision: torch.dtype = getattr(torch, name)
    return precision


def cache_folder() -> Path:
    """Where converted models are kept: ``$LAYERSKIP_CACHE``, or ``layerskip`` in the user's cache folder."""
    own = os.environ.get("LAYERSKIP_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerskip"


def _locate(source: str) -> str:
    """A folder, a GGUF file or a hub id."""
    alias = ALIASES.get(source)
    if alias is not None:
        package = find_spec(alias.package)
        folders = package.submodule_search_locations if package else None
        shipped = Path(folders[0]) / alias.file if folders else None
        return str(shipped) if shipped is not None and shipped.is_file() else alias.hub_id
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"model '{source}': no such file{_perhaps(source)}")
        return str(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"model '{source}': the folder has no config.json; expected a Hugging Face model")
        return str(path)
    if path.is_file():
        raise CheckpointError(f"model '{source}': expected a .gguf file or a folder, found another kind of file")
    if source.startswith((".", "/", "~")):
        raise CheckpointError(f"model '{source}': no such file or folder{_perhaps(source)}")
    logger.info("model '%s': no local folder, so from the hub or its cache", source)
    return source


def _check_hub(source: str, location: str, revision: str) -> None:
    """Find out at once that a model has to come from the hub and the hub cannot be reached: its client tries for long.

    Raises:
        CheckpointError: It is so.
    """
    if Path(location).exists() or constants.HF_HUB_OFFLINE:
        return
    try:
        if try_to_load_from_cache(location, "config.json", revision=revision) is None:
            get_hf_file_metadata(hf_hub_url(location, "config.json", revision=revision))
    except (HfHubHTTPError, HFValidationError):  # an answer: why it is no good, loading the model will say
        return
    except Exception as error:  # by whatever library the hub's client connects
        reason = f"{constants.ENDPOINT} cannot be reached ({_first_line(error)}): is there a network?"
        raise CheckpointError(f"model '{source}': {_missing(source, f': {reason}')}") from error


def _why(source: str, location: str, error: Exception) -> str:
    """One line on why a model did not load."""
    reason = _first_line(error)
    if Path(location).exists():
        return reason
    return _missing(source, " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else f": {reason}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _missing(source: str, why: str) -> str:
    """One line on a model that is nowhere, and on what was perhaps meant."""
    alias = ALIASES.get(source)
    if alias is not None:
        return f"the package '{alias.package}' is not installed, and {alias.hub_id} is not to be had from the hub{why}"
    known = f"not an alias ({', '.join(ALIASES)}), not a local file or folder"
    return f"{known}, and not to be had from the hub{why}{_perhaps(source)}"


def _perhaps(source: str) -> str:
    similar = _similar(source)
    return f"; did you mean '{similar[0]}'?" if similar else ""


def _similar(source: str) -> list[str]:
    """Aliases, and models beside where one was looked for, whose names look alike; the likeliest first."""
    folder = Path(source).expanduser().parent
    try:
        beside = [str(path) for path in folder.iterdir() if path.suffix == ".gguf" or (path / "config.json").is_file()]
    except OSError:
        beside = []
    known = [*ALIASES, *(alias.hub_id for alias in ALIASES.values()), *beside]
    return difflib.get_close_matches(source, known, n=1)


def _converted(gguf: Path, dtype: torch.dtype) -> Path:
    """The folder with a GGUF file's model in Hugging Face format, made at the first call.

    Reading a GGUF file takes transformers tens of seconds; the copy loads in one.
    """
    status = gguf.stat()
    key = f"{gguf.resolve()}:{status.st_size}:{status.st_mtime_ns}:{dtype}"
    folder = cache_folder() / f"{gguf.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise MissingDependencyError(
                f"model '{gguf.name}': GGUF files need the package '{package}'; pip install 'layerskip[gguf]'"
            )
    logger.warning("converting %s once; later starts take the copy in %s", gguf.name, folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(
            f"cache folder {folder.parent}: {error.strerror}; set LAYERSKIP_CACHE to a writable folder"
        ) from error
    try:
        _convert(gguf, dtype, scratch)
        try:
            scratch.replace(folder)
        except OSError:
            if not folder.is_dir():  # another process may have been faster
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _convert(gguf: Path, dtype: torch.dtype, folder: Path) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
        # The weights are dequantized, but the config still says quantized, which forbids saving.
        del model.config.quantization_config
        model.hf_quantizer = None  # type: ignore[assignment]
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except OSError as error:
        raise CheckpointError(f"model '{gguf}': cannot be converted: {_first_line(error)}") from error
    except (ValueError, KeyError, IndexError, struct.error, NotImplementedError) as error:
        raise CheckpointError(
            f"model '{gguf}': not a GGUF file that transformers can read: {_first_line(error)}"
        ) from error
