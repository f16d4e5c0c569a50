"""``layerskip tune``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from cli.common import (
    INTERRUPTED,
    CompileOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    JsonOption,
    RunOptions,
    check_writable,
    interrupted_by_sigterm,
    open_model,
    print_json,
    print_measured_profile,
    quiet_libraries,
    stderr,
    stdout,
)

if TYPE_CHECKING:
    from layerskip import DraftProfile
    from layerskip.training import Loss
    from search.train_draft import TuningResult, TuningSettings
    from search.untrained_drafts import Kind


def tune(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_PROFILE",
            help="Alias, Hub id, folder or .gguf file; or a profile (.json) whose early exit to tune.",
        ),
    ] = "smollm2",
    exit_after: Annotated[
        int | None,
        typer.Option("--exit", help="Layers that the draft keeps.", show_default="the profile's, or an eighth of all"),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            help="What to train. In place of the layers above the exit: layer, a decoder layer, or bridge, an affine "
            "map. On top of the target model: medusa or hydra heads, or hydra++, with a decoder layer before the heads."
        ),
    ] = "layer",
    heads: Annotated[
        int | None, typer.Option(help="Number of draft heads; each drafts one token.", show_default="4")
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="kl (to the target's distribution), ce (of its tokens) or both.", show_default="kl; ce for medusa"
        ),
    ] = None,
    positions: Annotated[int, typer.Option(help="Positions of text, written by the model, to train on.")] = 80_000,
    minutes: Annotated[
        float | None,
        typer.Option(help="Maximum minutes of training, after the texts are written.", show_default="no limit"),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Maximum number of passes over the texts.")] = 8,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts to train on and to measure with, one per line, or .jsonl with 'prompt' or 'messages'.",
            show_default="the model writes its own, and 32 built-in ones are measured",
        ),
    ] = None,
    draft_vocabulary: Annotated[
        int | None,
        typer.Option(
            help="Number of tokens that the draft scores; 0 for all.",
            show_default="8192, or all if the model has fewer than twice as many",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens for each measured prompt.")] = 48,
    out: Annotated[Path, typer.Option(help="File to write the draft profile to.")] = Path("tuned_profile.json"),
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    engine: EngineOption = "auto",
    compiled: CompileOption = False,
    seed: Annotated[int, typer.Option(help="Seed for reproducible texts and training.")] = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a draft layer in place of the layers above an early exit, or draft heads, and save a draft profile.

    The model's own weights do not change. Ctrl-C during training keeps the best state; the same command resumes it.
    """
    from cli.progress import ProgressDisplay
    from layerskip import DraftProfile
    from layerskip.checkpoints import cache_folder
    from layerskip.engine import make_engine
    from layerskip.fingerprint import identify
    from layerskip.tokenizer import read_prompts
    from search.prompts import built_in_prompts, split_prompts
    from search.train_draft import Tuning, TuningSettings

    quiet_libraries()
    check_writable(out)
    settings = TuningSettings(
        exit=exit_after,
        kind=cast("Kind", kind),  # checked by the settings themselves
        heads=heads,
        loss=cast("Loss | None", loss),
        positions=positions,
        minutes=minutes,
        epochs=epochs,
        vocabulary=draft_vocabulary,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    profile = DraftProfile.load(source) if source.endswith(".json") else None
    if profile is not None:
        settings = _completed(settings, profile)
    given = read_prompts(prompts) if prompts else built_in_prompts()
    name = profile.model.id if profile else source
    stderr.print(f"loading {name}")
    revision = profile.revision if profile else None
    layers, tokenizer = open_model(name, RunOptions(device, dtype, engine, compiled), revision=revision)
    if profile is not None:
        profile.check(layers)
    longest = max(max_new_tokens, settings.answer_tokens if prompts else 0)
    split = split_prompts(given, tokenizer, max_new_tokens=longest, context_length=layers.context_length)
    try:
        with interrupted_by_sigterm(), ProgressDisplay() as progress:
            tuned = Tuning(
                make_engine(layers, engine),
                tokenizer,
                identify(layers, name),
                split,
                settings,
                given=prompts is not None,
                folder=cache_folder(),
                on_event=progress,
            ).run()
    except KeyboardInterrupt:
        stderr.print("texts and training are kept, no profile was written; the same command resumes")
        raise
    if profile is not None:
        tuned = replace(tuned, profile=_for_the_same_base_model(tuned.profile, profile))
    tuned.profile.save(out)
    if json:
        print_json(_described(tuned, out))
    else:
        _report(tuned, out)
    if tuned.interrupted:
        raise typer.Exit(INTERRUPTED)


def _completed(settings: TuningSettings, profile: DraftProfile) -> TuningSettings:
    """The settings, with the exit and the draft vocabulary of a profile where none were given."""
    from search.untrained_drafts import exit_of

    own = profile.tensors.vocabulary if profile.tensors is not None else None
    return replace(
        settings,
        exit=None if settings.drafts_with_heads else settings.exit or exit_of(profile.skip_set),
        vocabulary=own if settings.vocabulary is None else settings.vocabulary,
    )


def _for_the_same_base_model(tuned: DraftProfile, profile: DraftProfile) -> DraftProfile:
    """The tuned profile, for the published model and the revision that the profile names that was tuned."""
    return tuned.model_copy(
        update={"base_model_name_or_path": profile.base_model_name_or_path, "revision": profile.revision}
    )


def _described(tuned: TuningResult, out: Path) -> dict[str, Any]:
    agreement = tuned.agreement
    figures = ("speedup", "speedup_low", "speedup_high", "acceptance_rate", "near_ties")
    return {
        "profile": str(out),
        "exit": tuned.exit,
        "heads": tuned.heads,
        "positions": tuned.positions,
        "agreement": _by_rank(agreement.top),
        "agreement_by_head": [_by_rank(top) for top in agreement.by_place] if tuned.heads else None,
        "coverage": agreement.coverage,
        "ideal_speedup": tuned.ideal,
        "predicted_speedup": tuned.predicted,
        **{figure: getattr(tuned.profile.measured, figure, None) for figure in figures},
        "interrupted": tuned.interrupted,
    }


def _by_rank(top: Mapping[int, float]) -> dict[str, float]:
    return {str(k): share for k, share in top.items()}


def _report(tuned: TuningResult, out: Path) -> None:
    from cli.progress import format_agreement

    profile, agreement = tuned.profile, tuned.agreement
    exit_layer = f"exit      after layer {tuned.exit} of {profile.model.num_layers}"
    stdout.print((f"heads     {tuned.heads}" if tuned.heads else exit_layer) + f", on {tuned.positions} positions")
    stdout.print(f"draft     {profile.draft}")
    stdout.print(f"agreement {format_agreement(agreement)} on {agreement.positions} held-out positions")
    stdout.print(f"ideal     {tuned.ideal:.2f}×, if verification cost one plain step and drafting only its weights")
    if tuned.predicted is not None:
        stdout.print(f"predicted {tuned.predicted:.2f}×, simulated with the costs measured on this device")
    print_measured_profile(profile, out, "The draft was measured to be slower than plain decoding here.")
    if tuned.interrupted:
        stdout.print("Interrupted: nothing was measured; the same command resumes.")
