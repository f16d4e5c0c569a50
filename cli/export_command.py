"""``layerskip export``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import completion
from cli.common import (
    DebugOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    ProfileArgument,
    counted,
    print_json,
    quiet_libraries,
    stderr,
    stdout,
)
from layerskip.names import DTYPES

if TYPE_CHECKING:
    from layerskip.export import Export


def export(
    profile: ProfileArgument,
    to: Annotated[
        Path, typer.Option(help="Folder to write: missing, empty, or an earlier export.", show_default=False)
    ],
    model: ModelOption = None,
    without_bridges: Annotated[
        bool,
        typer.Option("--without-bridges", help="Leave out the profile's bridges, which lowers the acceptance rate."),
    ] = False,
    device: DeviceOption = "cpu",
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16 or float16; auto keeps the model's own, and is float32 for GGUF files.",
            autocompletion=completion.one_of("auto", *DTYPES),
        ),
    ] = "auto",
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a profile's draft as a checkpoint of its own, for engines that take a separate draft model.

    Its README has the commands for vLLM, llama.cpp and transformers.
    """
    from layerskip import LayerSkipModel, export_draft, load_checkpoint, load_profile
    from layerskip.checkpoints import stored_dtype
    from layerskip.export import check_exportable

    loaded = load_profile(profile, device=device)
    check_exportable(loaded, to, without_bridges=without_bridges)
    quiet_libraries()
    source, revision = model or loaded.model.id, None if model else loaded.revision
    if dtype == "auto":
        dtype = stored_dtype(source, revision=revision)
    checkpoint = load_checkpoint(source, device=device, dtype=dtype, revision=revision)
    if loaded.tensors is not None and loaded.tensors.bridges:
        stderr.print("the profile's acceptance rate was measured with its bridges; without them it will be lower")
    if loaded.tensors is not None and loaded.tensors.vocabulary:
        stderr.print("the profile's draft vocabulary is left out: engines need a draft that scores all tokens")
    layers = LayerSkipModel(checkpoint.model)
    exported = export_draft(layers, checkpoint.tokenizer, loaded, to, without_bridges=without_bridges)
    if json:
        print_json(asdict(exported) | {"folder": str(to)})
    else:
        _report(exported, to, loaded.skip_set.num_layers)


def _report(exported: Export, folder: Path, num_layers: int) -> None:
    zeroed = f", {counted(exported.zeroed, 'sublayer')} of them zeroed" * bool(exported.zeroed)
    trained = f", and {exported.trained} trained" * bool(exported.trained)
    stdout.print(f"draft     {folder}")
    stdout.print(f"layers    {len(exported.layers)} of {num_layers}{zeroed}{trained}")
    stdout.print(
        f"weights   {exported.parameters / 1e6:.1f} of {exported.full_parameters / 1e6:.1f} million, "
        f"{exported.parameters / exported.full_parameters:.0%}"
    )
    stdout.print(
        f"checked   loaded with stock transformers: its logits differ from the draft's by at most "
        f"{exported.difference:.1g}"
    )
    stdout.print(f"use       {folder / 'README.md'} has the commands for vLLM, llama.cpp and transformers")
