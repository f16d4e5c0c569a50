"""Models from GGUF files, converted once into Hugging Face format: whole, or not at all.

transformers fills what a file lacks with random numbers, and leaves out what it does not know; both are refused here.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from layerskip.errors import CheckpointError, MissingDependencyError, first_line

logger = logging.getLogger(__name__)

# Changes when a conversion gives something else, so that copies of earlier versions are not used.
_VERSION = 2
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_SPLIT = "split."
# Tokens that end a turn or a message, which llama.cpp takes for ends of the text.
_ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def converted(gguf: Path, dtype: torch.dtype, cache: Path) -> Path:
    """The folder with a GGUF file's model in Hugging Face format, written at the first call.

    Reading a GGUF file takes transformers tens of seconds; the copy loads in one.

    Args:
        gguf: The file; of a model in several files, any of them.
        dtype: The type of the copy's weights.
        cache: Where the copy is kept.

    Raises:
        CheckpointError: The file cannot be read, lacks a tensor or has something that transformers does not read; or
            the copy cannot be written.
        MissingDependencyError: The ``gguf`` extra is not installed.
    """
    files = _all_parts(gguf)
    stamps = [f"{file.resolve()}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files]
    key = ":".join([*stamps, str(dtype), str(_VERSION)])
    folder = cache / f"{files[0].stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise MissingDependencyError(
                f"model '{gguf.name}': GGUF files need the package '{package}'; pip install 'layerskip[gguf]'"
            )
    logger.warning("converting %s once, which may take a minute; later runs load the copy in %s", gguf.name, folder)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=cache))
    except OSError as error:
        raise CheckpointError(
            f"cache folder {cache}: {error.strerror}; set LAYERSKIP_CACHE to a writable folder"
        ) from error
    try:
        _convert(files, dtype, scratch)
        try:
            scratch.replace(folder)
        except OSError:
            if not folder.is_dir():  # another process may have been faster
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _all_parts(gguf: Path) -> list[Path]:
    """The files of a model, in order: the file itself, or all parts of one that was split."""
    part = _PART.fullmatch(gguf.name)
    if part is None:
        return [gguf]
    count, suffix = int(part["count"]), gguf.suffix
    parts = [gguf.with_name(f"{part['stem']}-{number:05}-of-{count:05}{suffix}") for number in range(1, count + 1)]
    missing = [file.name for file in parts if not file.is_file()]
    if missing:
        raise CheckpointError(f"model '{gguf}': is one of {count} files, and {missing[0]} is not beside it")
    return parts


def _convert(files: list[Path], dtype: torch.dtype, folder: Path) -> None:
    name = files[0]
    try:
        gguf = name if len(files) == 1 else _joined(files, folder / name.name)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
        model, info = loaded
        _check_complete(name, gguf, model, info)
        # The weights are dequantized, but the config still says quantized, which forbids saving.
        del model.config.quantization_config
        model.hf_quantizer = None
        _add_ends(model, gguf)
        if gguf != name:
            gguf.unlink()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except OSError as error:
        raise CheckpointError(f"model '{name}': cannot be converted: {first_line(error)}") from error
    except (ValueError, KeyError, IndexError, struct.error, NotImplementedError) as error:
        raise CheckpointError(
            f"model '{name}': not a GGUF file that transformers can read: {first_line(error)}"
        ) from error


def _joined(parts: list[Path], target: Path) -> Path:
    """One file with the metadata of the first part and the tensors of all."""
    from gguf import GGUFReader

    readers = [GGUFReader(part) for part in parts]
    tensors = chain.from_iterable(reader.tensors for reader in readers)
    write_gguf(target, readers[0], ((tensor.name, tensor.data, tensor.tensor_type) for tensor in tensors))
    return target


def write_gguf(
    target: Path, like: Any, tensors: Iterable[tuple[str, Any, Any]], *, file_type: int | None = None
) -> None:
    """Write a GGUF file.

    Args:
        target: The file.
        like: A ``gguf.GGUFReader``, whose metadata it gets.
        tensors: Name, values or blocks of them, and type of each.
        file_type: What its metadata say of the type of most tensors; None as in ``like``.
    """
    from gguf import GGUFValueType, GGUFWriter, Keys

    written = {Keys.General.ARCHITECTURE} | ({Keys.General.FILE_TYPE} if file_type is not None else set())
    writer = GGUFWriter(target, like.fields[Keys.General.ARCHITECTURE].contents())
    for field in like.fields.values():
        if not field.name.startswith(("GGUF.", _SPLIT)) and field.name not in written:
            kind = field.types[0]
            inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    if file_type is not None:
        writer.add_file_type(file_type)
    for name, values, kind in tensors:
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check_complete(name: Path, gguf: Path, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Make sure that all of a file was read, and that nothing of the model is left at random.

    Raises:
        CheckpointError: It was not, or something is. The message names the first tensor or setting.
    """
    for what, names in (
        ("lacks", sorted(info["missing_keys"])),
        ("has another shape than its metadata says:", sorted(key for key, *_ in info["mismatched_keys"])),
        ("has what transformers does not read:", sorted(_unread(gguf, model))),
    ):
        if names:
            more = "" if len(names) == 1 else f" (and {len(names) - 1} more)"
            raise CheckpointError(
                f"model '{name}': {what} {names[0]}{more}; its text would be another model's. Take the model in "
                "Hugging Face format"
            )


def _unread(path: Path, model: PreTrainedModel) -> Iterator[str]:
    """Tensors and settings of a file that change what it computes, and that transformers leaves out."""
    from gguf import MODEL_ARCH_NAMES, GGUFReader, Keys, get_tensor_name_map

    reader = GGUFReader(path)
    architecture = reader.fields[Keys.General.ARCHITECTURE].contents()
    [arch] = [arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture]
    known = get_tensor_name_map(arch, int(model.config.num_hidden_layers))
    read = set()
    for key in model.state_dict():
        base, _, kind = key.rpartition(".")
        read.add(f"{known.get_name(base)}.{kind}")
    for tensor in reader.tensors:
        # Factors of 1 for the rotary frequencies are none.
        if tensor.name not in read and not (tensor.name == "rope_freqs.weight" and bool((tensor.data == 1).all())):
            yield tensor.name
    scaling = reader.fields.get(f"{architecture}.rope.scaling.type")
    if scaling is not None and scaling.contents() != "none" and not _scales_positions(model):
        yield scaling.name


def _scales_positions(model: PreTrainedModel) -> bool:
    parameters: dict[str, Any] = getattr(model.config, "rope_parameters", None) or {}
    by_layer_type = [rope for rope in parameters.values() if isinstance(rope, dict)]
    return any(rope.get("rope_type", "default") != "default" for rope in by_layer_type or [parameters])


def _add_ends(model: PreTrainedModel, gguf: Path) -> None:
    """Let a text end where llama.cpp ends it: at the end of a turn or a message, too."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    ends = [int(fields[name].contents()) for name in _ENDS if name in fields]
    settings: Any = model.generation_config
    known = settings.eos_token_id
    before = [] if known is None else [known] if isinstance(known, int) else list(known)
    settings.eos_token_id = list(dict.fromkeys([*before, *ends])) or None
