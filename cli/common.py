"""What commands share: options, printing, and opening a model."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from cli import completion
from layerskip.errors import CheckpointError, InvalidInputError
from layerskip.names import DEVICES, DTYPES, ENGINES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from layerskip import DraftProfile, LayerSkipModel
    from layerskip.generation import Generation

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130  # exit statuses

# Options.

DEFAULT_STORAGE = completion.DEFAULT_STORAGE


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Treat SIGTERM, with which batch systems preempt a job, as Ctrl-C while the block runs."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


DEBUG = "--debug"  # looked for by cli.main, which prints the errors of all commands
DebugOption = Annotated[bool, typer.Option(DEBUG, help="Show the traceback of an error.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object to stdout, and everything else to stderr.")
]
StorageOption = Annotated[
    str, typer.Option(help="Database of studies: any Optuna storage URL.", envvar=completion.STORAGE_VARIABLE)
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
        help="float32, bfloat16 or float16; auto is bfloat16 on CUDA and float32 elsewhere.",
        autocompletion=completion.one_of("auto", *DTYPES),
    ),
]
EngineOption = Annotated[
    str,
    typer.Option(
        help="How passes run: eager; packed, on a CPU with weights packed once for its kernels; cuda-graphs, on one "
        "CUDA device (experimental); or auto: packed where a quick measurement says that it is faster.",
        autocompletion=completion.one_of(*ENGINES),
    ),
]
CompileOption = Annotated[
    bool, typer.Option("--compile/--no-compile", help="Compile sublayers; the first passes then take about a minute.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        help="Another location of the profile's model.",
        show_default="the profile's model id",
        autocompletion=completion.models,
    ),
]
CorpusOption = Annotated[
    Path | None,
    typer.Option(
        help="A text file that answers may repeat parts of, such as the code to edit: drafts are copied from it, too."
    ),
]
ModelArgument = Annotated[
    str, typer.Argument(help="Alias, Hub id, folder or .gguf file.", autocompletion=completion.models)
]
ProfileArgument = Annotated[
    str,
    typer.Argument(
        help="A draft profile: file, folder, name of a ready profile, or owner/name on the Hub.",
        show_default=False,
        autocompletion=completion.profiles,
    ),
]
StudyArgument = Annotated[
    str, typer.Argument(help="Name of the study.", show_default=False, autocompletion=completion.studies)
]
RepeatsOption = Annotated[int, typer.Option(help="How often each method decodes each prompt.", min=1)]


def check_writable(out: Path) -> None:
    """Raise an ``InvalidInputError`` if a file cannot be written to, before the work whose result it is for."""
    folder = out.absolute().parent
    if out.exists() and not out.is_file():
        raise InvalidInputError(f"--out {out}: is a {'folder' if out.is_dir() else 'device'}; expected a file name")
    if not folder.is_dir():
        raise InvalidInputError(f"--out {out}: no such folder: {folder}")
    if not os.access(folder, os.W_OK):
        raise InvalidInputError(f"--out {out}: the folder {folder} is not writable")


# Printing: results to stdout, everything else to stderr.

stdout = Console(highlight=False, markup=False, soft_wrap=True)
stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def escape_unencodable() -> None:
    """Print characters that the terminal's encoding lacks, such as ASCII's, as escapes instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def quiet_libraries() -> None:
    """Keep progress bars and notices of the libraries off the terminal; errors still show."""
    import transformers

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; the error comes at the end
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.basicConfig(format="%(message)s")


def print_json(result: dict[str, Any]) -> None:
    """Print one JSON object, alone on stdout."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(result, ensure_ascii=not unicode), flush=True)  # read while the dashboard runs


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print a table of text, names on the left and figures on the right, as :func:`print_untruncated` does."""
    table = Table(box=None, title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    print_untruncated(table)


def print_untruncated(table: Table) -> None:
    """Print a table as wide as its content, so that names can be copied whole even from a narrow terminal."""
    unlimited = stdout.options.update(max_width=10_000)
    Console(width=Measurement.get(stdout, unlimited, table).maximum, highlight=False, markup=False).print(table)


def write_page(out: Path, page: str) -> None:
    """Write an HTML page to the file of ``--out``."""
    from layerskip.utils import write_atomically

    try:
        write_atomically(out, page)
    except OSError as error:
        raise InvalidInputError(f"--out {out}: cannot write the report: {error.strerror}") from error


def counted(number: int, noun: str) -> str:
    """A number of things, as ``1 token`` or ``2 tokens``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def times_each(repeats: int) -> str:
    """How often each prompt is decoded, as ``once each`` or ``2 times each``."""
    return f"{repeats} times each" if repeats > 1 else "once each"


def describe_speedup(measured: dict[str, Any]) -> str:
    """A measured speedup with its interval, as ``1.23× (95 %: 1.19 to 1.27)``; without one if there was one prompt."""
    low, high = measured["speedup_low"], measured["speedup_high"]
    interval = f" (95 %: {low:.2f} to {high:.2f})" if low < high else ""
    return f"{measured['speedup']:.2f}×{interval}"


def describe_near_ties(count: int) -> str:
    """How many outputs diverge from plain decoding, and why that is no error."""
    return f"{counted(count, 'output')} diverge{'s' * (count == 1)} at a near-tie of the top two tokens"


def no_gain_note(measured: dict[str, Any]) -> str | None:
    """A sentence on a measured speedup above 1× that shows no gain, in the words of ``compare``; None on any other."""
    from studies.statistics import CROSSES_ONE, FEW_PROMPTS, FEWEST_PROMPTS

    if measured["speedup"] <= 1:
        return None
    if measured["prompts"] < FEWEST_PROMPTS:
        return FEW_PROMPTS
    return CROSSES_ONE if measured["speedup_low"] <= 1 else None


# A gain of bfloat16 below this is not worth its near-ties.
_WORTH_SAYING = 1.1


def describe_bfloat16(tokens_per_second: float, saved: float | None) -> str | None:
    """What a model in float32 would gain by bfloat16 and what that costs; None where it would not be clearly faster.

    Args:
        tokens_per_second: Of plain decoding.
        saved: Seconds of a plain step that bfloat16 would save; None where that is not known.
    """
    if saved is None or saved * tokens_per_second >= 1:
        return None
    expected = 1 / (1 / tokens_per_second - saved)
    if expected < _WORTH_SAYING * tokens_per_second:
        return None
    return (
        f"with --dtype bfloat16 plain decoding would run at about {expected:.0f} tokens/s here instead of "
        f"{tokens_per_second:.0f}; but near-ties may then be resolved differently, with or without a draft"
    )


def describe_memory(draft_bytes: int) -> str:
    """What a draft takes of memory."""
    return f"{draft_bytes / 2**20:,.0f} MiB for the draft, in addition to the model"


def print_measured_profile(profile: DraftProfile, out: Path, if_slower: str) -> None:
    """Print the speedup of a new profile, its file, and what follows from the speedup.

    Args:
        profile: The profile; without a measurement, only its file is printed.
        out: Its file.
        if_slower: Says that the draft was measured to be slower than plain decoding.
    """
    from studies.statistics import describe_disturbed

    measured = profile.measured
    if measured is not None:
        stdout.print(
            f"speedup   {describe_speedup(measured.model_dump())} on "
            f"{counted(measured.prompts, f'{measured.prompt_set} prompt')}: "
            f"{measured.plain_tokens_per_second:.1f} → {measured.speculative_tokens_per_second:.1f} tokens/s"
        )
        if measured.draft_bytes:
            stdout.print(f"memory    {describe_memory(measured.draft_bytes)}")
        if measured.near_ties:
            stdout.print(f"near-ties {describe_near_ties(measured.near_ties)}")
        if measured.disturbed:
            uncertain = describe_disturbed(measured.disturbed, measured.prompts)
            stdout.print(f"uncertain {uncertain}, with 'layerskip bench'")
    stdout.print(f"profile   {out}")
    if not profile.pays:
        stdout.print(f"{if_slower} 'layerskip apply' will not draft with this profile unless --force is given.")
    elif measured is not None and (note := no_gain_note(measured.model_dump())):
        stdout.print(note)


def describe_generation(generation: Generation, text: str, *, speculative: bool) -> dict[str, Any]:
    """A generation as plain values, for JSON and for :func:`generation_line`."""
    stats = generation.stats
    return {
        "text": text,
        "token_ids": generation.tokens,
        "finish_reason": generation.finish_reason,
        "speculative": speculative,
        "tokens_per_second": stats.tokens_per_second,
        "acceptance_rate": stats.acceptance_rate,
        **asdict(stats),
    }


def generation_line(result: dict[str, Any]) -> str:
    """The figures of a generation in one line."""
    parts = [counted(result["tokens"], "token"), f"{result['tokens_per_second']:.1f} tokens/s"]
    parts.append("self-speculative" if result["speculative"] else "plain")
    if result["acceptance_rate"] is not None:
        parts.append(f"{result['acceptance_rate']:.0%} of {counted(result['drafted'], 'drafted token')} accepted")
    if "speedup" in result:
        output = {True: ", identical output", False: ", different output", None: " (sampled: outputs differ)"}
        parts.append(f"plain decoding: {result['plain_tokens_per_second']:.1f} tokens/s{output[result['same_text']]}")
        parts.append(f"speedup {result['speedup']:.2f}× (one prompt, timed once: 'layerskip bench' measures)")
    return " · ".join(parts)


# Opening a model.


@dataclass(frozen=True)
class RunOptions:
    """Where and how a model runs, as the options of these names say."""

    device: str
    dtype: str
    engine: str
    compiled: bool = False


def open_model(
    source: str, options: RunOptions, *, revision: str | None = None
) -> tuple[LayerSkipModel, PreTrainedTokenizerBase]:
    """Load a model with its tokenizer, after a check that the engine can run it there.

    Raises:
        CheckpointError: The model cannot be loaded.
        InvalidInputError: There is no such device, dtype or engine here.
    """
    from layerskip import LayerSkipModel, load_checkpoint
    from layerskip.checkpoints import resolve_device
    from layerskip.engine import check_engine, compile_sublayers

    check_engine(options.engine, resolve_device(options.device))
    checkpoint = load_checkpoint(source, device=options.device, dtype=options.dtype, revision=revision)
    model = LayerSkipModel(checkpoint.model)
    if note := _slow_bfloat16_note(model):
        stderr.print(note)
    if options.compiled:
        compile_sublayers(model)
    return model, checkpoint.tokenizer


def _slow_bfloat16_note(model: LayerSkipModel) -> str | None:
    """One line on a model in bfloat16 on a processor that verifies slowly in it; None on any other."""
    import torch

    from layerskip.packed_linear import has_kernels_for, packing_available

    is_slow = packing_available() and not has_kernels_for(torch.bfloat16)
    if not is_slow or model.device.type != "cpu" or model.dtype != torch.bfloat16:
        return None
    return (
        "this processor has no kernels for bfloat16: a pass over several tokens takes several times as long as over "
        "one, so that drafts hardly pay; with --dtype float32 they can"
    )


def open_model_of(
    profile: DraftProfile, location: str | None, options: RunOptions
) -> tuple[LayerSkipModel, PreTrainedTokenizerBase]:
    """Load the model of a profile, from another location if ``--model`` names one. Raises as :func:`open_model`."""
    if location is not None:
        return open_model(location, options)
    try:
        return open_model(profile.model.id, options, revision=profile.revision)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --model names another location of the profile's model") from error
