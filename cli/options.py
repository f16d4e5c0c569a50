"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import completion
from layerskip.names import DEVICES, DTYPES, ENGINES

DEFAULT_STORAGE = completion.DEFAULT_STORAGE

_debugging = False


def _remember_debug(wanted: bool) -> None:
    global _debugging
    _debugging = wanted


def debugging() -> bool:
    """Whether this run was asked to show tracebacks."""
    return _debugging


DebugOption = Annotated[
    bool, typer.Option("--debug", callback=_remember_debug, is_eager=True, help="Show the traceback of an error.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, and everything else on stderr.")
]
StorageOption = Annotated[
    str, typer.Option(help="Where studies live: any Optuna storage URL.", envvar="LAYERSKIP_STORAGE")
]
DeviceOption = Annotated[
    str,
    typer.Option(
        help="cpu, cuda, cuda:1 …; auto uses a GPU if there is one.",
        autocompletion=completion.one_of("auto", *DEVICES),
    ),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16 or float16; auto takes bfloat16 on CUDA, float32 elsewhere.",
        autocompletion=completion.one_of("auto", *DTYPES),
    ),
]
EngineOption = Annotated[
    str,
    typer.Option(
        help="How passes run: eager, or cuda-graphs on one CUDA device (experimental).",
        autocompletion=completion.one_of(*ENGINES),
    ),
]
CompileOption = Annotated[
    bool, typer.Option("--compile/--no-compile", help="Compile sublayers; the first passes then take a minute or so.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        help="Another location of the profile's model.",
        show_default="the profile's model id",
        autocompletion=completion.models,
    ),
]
StudyArgument = Annotated[
    str, typer.Argument(help="Name of the study.", show_default=False, autocompletion=completion.studies)
]
ProfileArgument = Annotated[
    str,
    typer.Argument(
        help="A draft profile: its file or folder, the name of a ready one, or owner/name on the hub.",
        show_default=False,
        autocompletion=completion.profiles,
    ),
]
ModelArgument = Annotated[
    str, typer.Argument(help="Alias, hub id, folder or .gguf file.", autocompletion=completion.models)
]
MeasuredPromptsOption = Annotated[
    Path | None,
    typer.Option(
        help="Prompts, one a line, or .jsonl with 'prompt' or 'messages'.",
        show_default="the built-in ones that searches hold out",
    ),
]
RepeatsOption = Annotated[int, typer.Option(help="How often each prompt is decoded in each way.", min=1)]
