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
    ModelArgument,
    RepeatsOption,
    RunOptions,
    check_writable,
    counted,
    open_model,
    print_json,
    print_table,
    quiet_libraries,
    stderr,
    stdout,
    write_page,
)
from cli.measured_prompts import MeasuredPromptsOption, PerCategoryOption, SuiteOption, ToMeasure

if TYPE_CHECKING:
    from studies.comparison import Comparison


def compare(
    model: ModelArgument = "smollm2",
    profile: Annotated[
        list[str] | None,
        typer.Option(
            help="A draft profile to include; repeatable. The model's ready profiles are always included.",
            show_default=False,
            autocompletion=completion.profiles,
        ),
    ] = None,
    combine: Annotated[bool, typer.Option("--combine", help="Also measure each profile with prompt lookup.")] = False,
    transformers: Annotated[
        bool, typer.Option("--transformers/--no-transformers", help="Include transformers' own decoding methods.")
    ] = True,
    prompts: MeasuredPromptsOption = None,
    suite: SuiteOption = None,
    per_category: PerCategoryOption = None,
    repeats: RepeatsOption = 3,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens for each prompt.", min=1)] = 48,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Also write a page with figures here.", show_default=False),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    engine: EngineOption = "auto",
    compiled: CompileOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure all decoding methods for a model on this machine, on the same prompts, and recommend one."""
    from cli.progress import step_bar
    from layerskip import load_profile
    from layerskip.checkpoints import cache_folder
    from layerskip.engine import make_engine
    from layerskip.utils import device_name, dtype_name, library_versions
    from search.compare import (
        compare,
        layerskip_methods,
        named_profiles,
        ready_profiles_for,
        transformers_methods,
        usable_methods,
    )
    from search.machine_lock import MachineLock
    from search.measure import MeasuringPlan
    from search.memory_limit import measure_memory_limit
    from studies.comparison import Comparison, described

    quiet_libraries()
    if out is not None:
        check_writable(out)
    to_measure = ToMeasure.read(prompts, suite, per_category)
    profiles = named_profiles(profile or [], lambda name: load_profile(name, device=device, dtype=dtype))
    layers, tokenizer = open_model(model, RunOptions(device, dtype, engine, compiled))
    runner = make_engine(layers, engine, in_place=not transformers)  # transformers decodes with plain weights
    profiles |= ready_profiles_for(layers, profiles.values(), device=device, dtype=dtype)
    methods = layerskip_methods(runner, profiles, combine=combine)
    left_out: dict[str, str] = {}
    if transformers:
        more, left_out = transformers_methods(layers, profiles)
        methods = [*methods, *more]
    lock = MachineLock(cache_folder(), layers.device)
    with lock.shared():  # a search may be measuring
        encoded = to_measure.encoded(runner, tokenizer, max_new_tokens)
    to_measure.announce(len(encoded), f"with {counted(len(methods), 'method')}", repeats)
    usable, failed = usable_methods(methods, encoded[0])
    plan = MeasuringPlan(encoded, max_new_tokens, repeats)
    memory = measure_memory_limit(layers, lock)
    with step_bar("decoding", len(encoded) * repeats) as show_done:
        entries = compare(layers, usable, plan, lock, show_done)
    comparison = Comparison(
        model=model,
        device=device_name(layers.device),
        dtype=dtype_name(layers.dtype),
        engine=runner.name,
        versions=library_versions(),
        repeats=repeats,
        max_new_tokens=max_new_tokens,
        entries=entries,
        left_out=left_out | failed,
        memory=memory,
        categories={prompt.id: prompt.category for prompt in encoded if prompt.category},
    )
    if out is not None:
        write_page(out, _page(comparison))
    if json:
        print_json(described(comparison) | {"report": None if out is None else str(out)})
    else:
        _report(comparison, out)


def _page(comparison: Comparison) -> str:
    from studies.comparison import advice, facts
    from studies.figures.comparison_figures import comparison_figures
    from studies.report import render_page

    title = f"Decoding methods for {comparison.model}"
    return render_page(title, advice(comparison), facts(comparison), comparison_figures(comparison))


def _report(comparison: Comparison, out: Path | None) -> None:
    from studies.comparison import advice, category_table, facts, table

    for name, value in facts(comparison):
        stdout.print(f"{name:<9} {value}")
    for name, reason in comparison.left_out.items():
        stderr.print(f"{name} is left out: {reason}", style="dim")
    print_table(*table(comparison))
    if comparison.categories:
        print_table(*category_table(comparison), "speedup by category")
    if out is not None:
        stdout.print(f"report    {out}")
    stdout.print(advice(comparison))
