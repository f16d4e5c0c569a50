"""``layerskip compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import completion
from cli.common import (
    CompileOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    JsonOption,
    MeasuredPromptsOption,
    ModelArgument,
    RepeatsOption,
    check_writable,
    print_json,
    print_untruncated,
    quiet_libraries,
    stderr,
    stdout,
)

if TYPE_CHECKING:
    from studies.comparison import Comparison


def compare(
    model: ModelArgument = "smollm2",
    profile: Annotated[
        list[str] | None,
        typer.Option(
            help="A draft profile that takes part; may be repeated. Ready ones of the model do anyway.",
            show_default=False,
            autocompletion=completion.profiles,
        ),
    ] = None,
    combine: Annotated[
        bool, typer.Option("--combine", help="Let each profile also take part with n-grams as a first try.")
    ] = False,
    transformers: Annotated[
        bool, typer.Option("--transformers/--no-transformers", help="Let transformers' own modes take part.")
    ] = True,
    prompts: MeasuredPromptsOption = None,
    repeats: RepeatsOption = 3,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens for each prompt.", min=1)] = 48,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write a page with figures here.", show_default=False)
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    engine: EngineOption = "eager",
    compiled: CompileOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure every way to decode a model here, on the same prompts in one run, and say which to use."""
    from studies.comparison import described

    quiet_libraries()
    if out is not None:
        check_writable(out)
    comparison = _compared(
        model,
        profile or [],
        combine=combine,
        transformers=transformers,
        prompts=prompts,
        repeats=repeats,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        engine=engine,
        compiled=compiled,
    )
    if out is not None:
        _write(comparison, out)
    if json:
        print_json(described(comparison) | {"report": None if out is None else str(out)})
    else:
        _report(comparison, out)


def _compared(
    source: str,
    profiles: list[str],
    *,
    combine: bool,
    transformers: bool,
    prompts: Path | None,
    repeats: int,
    max_new_tokens: int,
    device: str,
    dtype: str,
    engine: str,
    compiled: bool,
) -> Comparison:
    from cli.progress import Steps
    from layerskip import load_checkpoint, load_profile
    from layerskip.checkpoints import cache_folder, resolve_device
    from layerskip.engine import check_engine
    from layerskip.tokenizer import read_prompts
    from layerskip.utils import device_name, library_versions
    from search.compare import (
        compare,
        layerskip_methods,
        named_profiles,
        ready_profiles_for,
        transformers_methods,
        usable_methods,
    )
    from search.loading import engine_of
    from search.machine_lock import MachineLock
    from search.measure import MeasuringPlan
    from search.prompts import prompts_to_measure
    from studies.comparison import Comparison

    check_engine(engine, resolve_device(device))
    own_prompts = read_prompts(prompts) if prompts else None
    given = named_profiles(profiles, lambda name: load_profile(name, device=device, dtype=dtype))
    checkpoint = load_checkpoint(source, device=device, dtype=dtype)
    runner = engine_of(checkpoint.model, engine, compiled)
    layers = runner.model
    taking_part = given | ready_profiles_for(layers, given.values(), device=device, dtype=dtype)
    methods = layerskip_methods(runner, taking_part, combine=combine)
    left_out: dict[str, str] = {}
    if transformers:
        theirs, left_out = transformers_methods(layers, taking_part)
        methods = [*methods, *theirs]
    chosen = prompts_to_measure(
        own_prompts, checkpoint.tokenizer, max_new_tokens=max_new_tokens, context_length=layers.context_length
    )
    usable, failed = usable_methods(methods, chosen[0])
    plan = MeasuringPlan(chosen, max_new_tokens, repeats)
    with Steps("decoding", len(chosen) * repeats) as steps:
        entries = compare(layers, usable, plan, MachineLock(cache_folder(), layers.device), steps.done)
    return Comparison(
        model=source,
        device=device_name(layers.device),
        dtype=str(layers.dtype).removeprefix("torch."),
        engine=runner.name,
        versions=library_versions(),
        repeats=repeats,
        max_new_tokens=max_new_tokens,
        entries=entries,
        left_out=left_out | failed,
    )


def _write(comparison: Comparison, out: Path) -> None:
    from layerskip.errors import InvalidInputError
    from layerskip.utils import write_atomically
    from studies.comparison import advice, facts
    from studies.figures.comparison_figures import comparison_figures
    from studies.report import render_page

    title = f"Ways to decode {comparison.model}"
    page = render_page(title, advice(comparison), facts(comparison), comparison_figures(comparison))
    try:
        write_atomically(out, page)
    except OSError as error:
        raise InvalidInputError(f"--out {out}: cannot write the report: {error.strerror}") from error


def _report(comparison: Comparison, out: Path | None) -> None:
    from rich.table import Table

    from studies.comparison import advice, facts, table

    for name, value in facts(comparison):
        stdout.print(f"{name:<9} {value}")
    for name, reason in comparison.left_out.items():
        stderr.print(f"{name} does not take part: {reason}", style="dim")
    columns, rows = table(comparison)
    shown = Table(box=None)
    for number, column in enumerate(columns):
        shown.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        shown.add_row(*row)
    print_untruncated(shown)
    if out is not None:
        stdout.print(f"report    {out}")
    stdout.print(advice(comparison))
