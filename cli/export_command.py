"""``layerskip export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import completion
from cli.options import DebugOption, DeviceOption, JsonOption, ModelOption, ProfileArgument
from cli.output import counted, print_json, quiet_libraries, stderr, stdout
from layerskip.names import DTYPES


def export(
    profile: ProfileArgument,
    to: Annotated[
        Path, typer.Option(help="Folder to write; missing, empty, or an earlier export.", show_default=False)
    ],
    model: ModelOption = None,
    without_bridges: Annotated[
        bool,
        typer.Option("--without-bridges", help="Leave the profile's bridges out, which lowers the acceptance rate."),
    ] = False,
    device: DeviceOption = "cpu",
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16 or float16; auto keeps the model's own, and takes float32 for GGUF files.",
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
        stderr.print(
            "the draft scores the whole vocabulary, as engines need it; the profile's draft vocabulary is left out"
        )
    done = export_draft(
        LayerSkipModel(checkpoint.model), checkpoint.tokenizer, loaded, to, without_bridges=without_bridges
    )
    if json:
        print_json(
            {
                "folder": str(to),
                "layers": list(done.layers),
                "trained": done.trained,
                "zeroed": done.zeroed,
                "parameters": done.parameters,
                "full_parameters": done.full_parameters,
                "difference": done.difference,
            }
        )
        return
    half = f", {counted(done.zeroed, 'sublayer')} in them zeroed" * bool(done.zeroed)
    trained = f", and {done.trained} trained" * bool(done.trained)
    stdout.print(f"draft     {to}")
    stdout.print(f"layers    {len(done.layers)} of {loaded.skip_set.num_layers}{half}{trained}")
    stdout.print(
        f"weights   {done.parameters / 1e6:.1f} of {done.full_parameters / 1e6:.1f} million, "
        f"{done.parameters / done.full_parameters:.0%}"
    )
    stdout.print(
        f"checked   loaded with stock transformers: logits differ from the draft's by at most {done.difference:.1g}"
    )
    stdout.print(f"use       {to / 'README.md'} has the commands for vLLM, llama.cpp and transformers")
