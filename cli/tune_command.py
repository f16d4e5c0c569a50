"""``layerskip tune``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.common import (
    INTERRUPTED,
    CompileOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    JsonOption,
    describe_speedup,
    no_gain_note,
    print_json,
    quiet_libraries,
    stderr,
    stdout,
)

if TYPE_CHECKING:
    from search.train_draft import Tuned


def tune(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_PROFILE",
            help="Alias, hub id, folder or .gguf file; or a profile (.json) whose early exit to tune.",
        ),
    ] = "smollm2",
    exit_after: Annotated[
        int | None,
        typer.Option("--exit", help="Layers that the draft keeps.", show_default="the profile's, or an eighth of all"),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            help="What stands in for the rest: a decoder layer, or a bridge (an affine map). Or draft heads behind the "
            "target model: medusa, hydra, or hydra++, which has a decoder layer before them."
        ),
    ] = "layer",
    heads: Annotated[
        int | None, typer.Option(help="Draft heads, each for one more token of a draft.", show_default="4")
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(help="kl (to the target model), ce (of its choices) or both.", show_default="kl; ce for medusa"),
    ] = None,
    positions: Annotated[int, typer.Option(help="Positions of the model's own text to learn from.")] = 80_000,
    minutes: Annotated[
        float | None, typer.Option(help="Most minutes of training, behind the writing.", show_default="no limit")
    ] = None,
    epochs: Annotated[int, typer.Option(help="How often each text is learned from, at most.")] = 8,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts to learn from and to measure, one a line, or .jsonl with 'prompt' or 'messages'.",
            show_default="the model writes its own, and 32 built-in ones are measured",
        ),
    ] = None,
    draft_vocabulary: Annotated[
        int | None,
        typer.Option(
            help="Tokens that the draft scores; 0 for all.",
            show_default="8192, or all where there are not twice as many",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of each prompt that is measured.")] = 48,
    out: Annotated[Path, typer.Option(help="Where to write the draft profile.")] = Path("tuned_profile.json"),
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    engine: EngineOption = "eager",
    compiled: CompileOption = False,
    seed: Annotated[int, typer.Option(help="Makes texts and training repeatable.")] = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train what stands in for the layers above an early exit, or draft heads, and save it as a draft profile.

    The model's own weights do not change. Ctrl-C while it trains keeps the best so far; the same command goes on where
    it stopped.
    """
    from cli.tune_inputs import TuningProgress, checked_settings, opened
    from search.train_draft import Tuning

    quiet_libraries()
    settings = checked_settings(
        out,
        exit=exit_after,
        kind=kind,
        heads=heads,
        loss=loss,
        positions=positions,
        minutes=minutes,
        epochs=epochs,
        vocabulary=draft_vocabulary,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    given = opened(source, prompts, settings, device=device, dtype=dtype, engine=engine, compiled=compiled)
    try:
        with TuningProgress() as progress:
            tuned = Tuning(
                given.engine,
                given.tokenizer,
                given.identity,
                given.split,
                given.settings,
                given=prompts is not None,
                folder=given.folder,
                on_event=progress,
            ).run()
    except KeyboardInterrupt:
        stderr.print("texts and training are kept, and no profile was written; the same command goes on")
        raise
    tuned.profile.save(out)
    _report(tuned, out, json)
    if tuned.interrupted:
        raise typer.Exit(INTERRUPTED)


def _report(tuned: Tuned, out: Path, json: bool) -> None:
    profile, agreement, measured = tuned.profile, tuned.agreement, tuned.profile.measured
    if json:
        print_json(
            {
                "profile": str(out),
                "exit": tuned.exit,
                "heads": tuned.heads,
                "positions": tuned.positions,
                "agreement": _by_rank(agreement.top),
                "agreement_by_head": [_by_rank(top) for top in agreement.by_place] if tuned.heads else None,
                "coverage": agreement.coverage,
                "ideal_speedup": tuned.ideal,
                "predicted_speedup": tuned.predicted,
                "speedup": measured.speedup if measured else None,
                "speedup_low": measured.speedup_low if measured else None,
                "speedup_high": measured.speedup_high if measured else None,
                "acceptance_rate": measured.acceptance_rate if measured else None,
                "near_ties": measured.near_ties if measured else None,
                "interrupted": tuned.interrupted,
            }
        )
        return
    from cli.tune_inputs import in_percent

    made = f"{tuned.heads}" if tuned.heads else f"after layer {tuned.exit} of {profile.model.num_layers}"
    stdout.print(f"{'heads' if tuned.heads else 'exit ':9} {made}, on {tuned.positions} positions")
    stdout.print(f"draft     {profile.draft}")
    stdout.print(f"agreement {in_percent(agreement)} of {agreement.positions} held-out positions")
    stdout.print(f"ideal     {tuned.ideal:.2f}×, if verifying cost one plain step and drafting what it reads")
    if measured is not None:
        stdout.print(f"predicted {tuned.predicted:.2f}×, by replay and what the parts of a step cost here")
        stdout.print(
            f"speedup   {describe_speedup(measured.model_dump())} on {measured.prompts} held-out prompts: "
            f"{measured.plain_tokens_per_second:.1f} → {measured.speculative_tokens_per_second:.1f} tokens/s"
        )
        if measured.near_ties:
            stdout.print(
                f"near-ties {measured.near_ties} outputs part where the model's two best tokens are as good as tied"
            )
    stdout.print(f"profile   {out}")
    if not profile.pays:
        stdout.print(
            "It was measured to be slower than plain decoding here; "
            "'layerskip apply' will decode plainly with it unless told --force."
        )
    elif measured is not None and (doubt := no_gain_note(measured.model_dump())):
        stdout.print(doubt)
    if tuned.interrupted:
        stdout.print("Interrupted: nothing was measured; the same command goes on where it stopped.")


def _by_rank(top: Mapping[int, float]) -> dict[str, float]:
    return {str(k): share for k, share in top.items()}
