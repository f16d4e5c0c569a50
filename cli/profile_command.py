"""``layerskip profile``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cli import completion
from cli.common import (
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ProfileArgument,
    counted,
    describe_memory,
    describe_speedup,
    print_json,
    print_untruncated,
    quiet_libraries,
    stdout,
)

if TYPE_CHECKING:
    from layerskip.profile import Measured

app = typer.Typer(help="Show, check and publish draft profiles.", no_args_is_help=True)


@app.command("show")
def show(profile: ProfileArgument, json: JsonOption = False, debug: DebugOption = False) -> None:
    """Print the contents of a draft profile."""
    from layerskip import load_profile

    loaded = load_profile(profile)
    if json:
        print_json(loaded.model_dump(mode="json"))
        return
    model, provenance = loaded.model, loaded.provenance
    stdout.print(
        f"model     {model.id} ({model.family}, {counted(model.num_layers, 'layer')}, fingerprint {model.fingerprint})"
    )
    stdout.print(f"skipped   {loaded.skip_set} ({len(loaded.skip_set)} of {2 * model.num_layers} sublayers)")
    stdout.print(f"draft     {loaded.draft}")
    if loaded.costs is not None:
        stdout.print(f"pauses    where it does not pay, by the costs of {loaded.costs.device}, {loaded.costs.dtype}")
    if loaded.measured is None:
        stdout.print("measured  never")
    else:
        _show_measured(loaded.measured)
    stdout.print(f"from      {provenance.origin}; {provenance.created:%Y-%m-%d %H:%M} by {provenance.tool}")


def _show_measured(measured: Measured) -> None:
    rate = "nothing drafted" if measured.acceptance_rate is None else f"{measured.acceptance_rate:.0%} accepted"
    prompts = counted(measured.prompts, f"{measured.prompt_set} prompt")
    versions = ", ".join(f"{name} {version}" for name, version in measured.versions.items())
    stdout.print(
        f"measured  {describe_speedup(measured.model_dump())}, {rate}, on {prompts} "
        f"of at most {counted(measured.max_new_tokens, 'token')}"
    )
    stdout.print(
        f"speed     {measured.plain_tokens_per_second:.1f} tokens/s plain, "
        f"{measured.speculative_tokens_per_second:.1f} tokens/s self-speculative"
    )
    if measured.draft_bytes:
        stdout.print(f"memory    {describe_memory(measured.draft_bytes)}")
    stdout.print(f"on        {measured.device}, {measured.dtype}; {versions}")


@app.command("check")
def check(
    profile: ProfileArgument,
    model: Annotated[
        str | None,
        typer.Option(
            help="Also check that the profile is for this model: alias, Hub id, folder or .gguf file.",
            autocompletion=completion.models,
        ),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Check that a draft profile is valid and, with --model, that it is for that model."""
    from layerskip import LayerSkipModel, load_checkpoint, load_profile

    quiet_libraries()
    loaded = load_profile(profile, device=device, dtype=dtype)
    same_weights = None
    if model is not None:
        layers = LayerSkipModel(load_checkpoint(model, device=device, dtype=dtype).model)
        same_weights = loaded.check(layers).fingerprint == loaded.model.fingerprint
    if json:
        print_json({"profile": profile, "valid": True, "model": model, "same_weights": same_weights})
    else:
        stdout.print(f"{profile}: a valid draft profile" + (f" for {model}" if model else ""))


@app.command("push")
def push(
    profile: ProfileArgument,
    repo_id: Annotated[
        str, typer.Argument(help="Repository on the Hub, owner/name; created if missing.", show_default=False)
    ],
    base_model: Annotated[
        str | None,
        typer.Option(help="The Hub id of the profile's model.", show_default="the profile's model id"),
    ] = None,
    base_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of that model.")] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch to commit to; created if missing.", show_default="the default branch")
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Visibility of a new repository.", show_default="the owner's settings"),
    ] = None,
    message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Publish a draft profile on the Hub, with its tensors and a model card. The model's own files stay unchanged.

    The token comes from 'hf auth login' or from the environment variable HF_TOKEN.
    """
    from layerskip.hub import load_profile, push_profile

    loaded = load_profile(profile)
    if base_model or base_revision:
        loaded = loaded.for_base_model(base_model or loaded.model.id, base_revision)
    quiet_libraries()
    address = push_profile(
        loaded, repo_id, commit_message=message, private=private, revision=revision, create_pr=create_pr
    )
    if json:
        print_json({"profile": profile, "repository": repo_id, "address": address})
    else:
        stdout.print(f"{profile}: {address}")


@app.command("list")
def list_(json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the ready profiles that come with layerskip. Every command that takes a profile accepts their names."""
    from rich.table import Table

    from layerskip.ready_profiles import ready_profiles

    entries = ready_profiles()
    if json:
        print_json({"profiles": [entry.model_dump() for entry in entries]})
        return
    if not entries:
        stdout.print("no ready profiles; 'layerskip search' finds one for your machine")
        return
    table = Table("name", "model", "speedup", "measured on", box=None)
    for entry in entries:
        table.add_row(entry.name, entry.model, describe_speedup(entry.model_dump()), f"{entry.device}, {entry.dtype}")
    print_untruncated(table)
