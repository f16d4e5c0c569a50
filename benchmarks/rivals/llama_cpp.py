"""llama.cpp's plain decoding of the same weights in the same type, where its Python package is installed.

It is no dependency: ``pip install llama-cpp-python`` compiles it, which takes some minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from layerskip import LayerSkipModel
from layerskip.gguf_conversion import write_gguf
from layerskip.utils import dtype_name
from search.decoding_methods import Decoded, DecodingMethod

NAME = "llama.cpp plain"
# What GGUF files call the types of tensors and of files.
_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_FILE_TYPES = {torch.float32: "ALL_F32", torch.bfloat16: "MOSTLY_BF16"}


def llama_cpp_method(
    model: LayerSkipModel, source: Path, folder: Path, longest: int
) -> tuple[list[DecodingMethod], dict[str, str]]:
    """llama.cpp's method, or why it cannot take part.

    Args:
        model: The model, which gives the type of the weights and the number of threads.
        source: Where it comes from.
        folder: For a file of its weights in that type.
        longest: Most tokens of a prompt and its continuation.
    """
    if source.suffix != ".gguf" or model.dtype not in _TYPES:
        return [], {NAME: "takes models from a .gguf file, in float32 or bfloat16"}
    try:
        from gguf import GGMLQuantizationType
        from llama_cpp import Llama
    except ImportError as error:
        return [], {NAME: f"the package {error.name} is not installed"}
    file = folder / f"{source.stem}-{dtype_name(model.dtype)}.gguf"
    write_dequantized(source, file, model.dtype)
    threads = torch.get_num_threads()
    llm = Llama(
        str(file),
        n_ctx=longest,
        n_threads=threads,
        n_threads_batch=threads,
        type_k=int(GGMLQuantizationType.F32),
        type_v=int(GGMLQuantizationType.F32),
        verbose=False,
    )
    return [DecodingMethod(NAME, _decode_with(llm, model.eos_token_ids), third_party=True)], {}


def _decode_with(llm: Any, eos: frozenset[int]) -> Any:
    def decode(prompt: Sequence[int], max_new_tokens: int) -> Decoded:
        llm.reset()  # or it would reuse what it computed for the same prompt before
        new: list[int] = []
        for token in islice(llm.generate(list(prompt), top_k=1, temp=0.0, repeat_penalty=1.0), max_new_tokens):
            new.append(int(token))
            if new[-1] in eos:
                break
        return Decoded(tuple(new), len(new), 0, 0, 0.0, None)

    return decode


def write_dequantized(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Write a GGUF file with the same metadata and its matrices in another type; vectors are in float32, as usual."""
    from gguf import GGUFReader, LlamaFileType

    reader = GGUFReader(source)
    tensors = map(partial(_converted, dtype), reader.tensors)
    write_gguf(target, reader, tensors, file_type=LlamaFileType[_FILE_TYPES[dtype]])


def _converted(dtype: torch.dtype, tensor: Any) -> tuple[str, Any, Any]:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    values = dequantize(tensor.data, tensor.tensor_type).astype("float32")
    kind = GGMLQuantizationType[_TYPES[dtype if values.ndim > 1 else torch.float32]]
    return tensor.name, quantize(values, kind), kind
