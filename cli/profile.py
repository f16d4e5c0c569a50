"""``layerskip profile``."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import DebugOption, DeviceOption, DtypeOption, JsonOption, ProfileArgument
from cli.output import describe_speedup, print_json, quiet_libraries, stdout

app = typer.Typer(help="Look at draft profiles.", no_args_is_help=True)


@app.command("show")
def show(profile: ProfileArgument, json: JsonOption = False, debug: DebugOption = False) -> None:
    """Print what a draft profile holds."""
    from layerskip import DraftProfile

    loaded = DraftProfile.load(profile)
    if json:
        print_json(loaded.model_dump(mode="json"))
        return
    model, measured, provenance = loaded.model, loaded.measured, loaded.provenance
    skipped = len(loaded.skip_set)
    stdout.print(f"model     {model.id} ({model.family}, {model.num_layers} layers, fingerprint {model.fingerprint})")
    stdout.print(f"skipped   {loaded.skip_set} ({skipped} of {2 * model.num_layers} sublayers)")
    stdout.print(f"draft     {loaded.draft}")
    if measured is None:
        stdout.print("measured  never")
    else:
        rate = "nothing drafted" if measured.acceptance_rate is None else f"{measured.acceptance_rate:.0%} accepted"
        stdout.print(
            f"measured  {describe_speedup(measured.model_dump())}, {rate}, on {measured.prompts} {measured.prompt_set} "
            f"prompts of at most {measured.max_new_tokens} tokens"
        )
        stdout.print(
            f"speed     {measured.plain_tokens_per_second:.1f} tokens/s plain, "
            f"{measured.speculative_tokens_per_second:.1f} tokens/s self-speculative"
        )
        versions = ", ".join(f"{name} {version}" for name, version in measured.versions.items())
        stdout.print(f"on        {measured.device}, {measured.dtype}; {versions}")
    origin = f"study {provenance.study}, trial {provenance.trial}" if provenance.study else "made by hand"
    stdout.print(f"from      {origin}; {provenance.created:%Y-%m-%d %H:%M} by {provenance.tool}")


@app.command("check")
def check(
    profile: ProfileArgument,
    model: Annotated[
        str | None,
        typer.Option(help="Also make sure that the profile is for this model: alias, hub id, folder or .gguf file."),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say whether a draft profile is valid and, with --model, whether it is for that model."""
    from layerskip import DraftProfile, LayerSkipModel, load_checkpoint

    loaded = DraftProfile.load(profile)
    if model is not None:
        quiet_libraries()
        loaded.check(LayerSkipModel(load_checkpoint(model, device=device, dtype=dtype).model))
    if json:
        print_json({"profile": str(profile), "valid": True, "model": model})
        return
    stdout.print(f"{profile}: a valid draft profile" + (f" for {model}" if model else ""))
