"""``layerskip bench``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.common import (
    CompileOption,
    CorpusOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    JsonOption,
    ModelOption,
    ProfileArgument,
    RepeatsOption,
    RunOptions,
    counted,
    describe_near_ties,
    describe_speedup,
    no_gain_note,
    open_model_of,
    print_json,
    print_table,
    quiet_libraries,
    stderr,
    stdout,
    times_each,
)
from cli.measured_prompts import MeasuredPromptsOption, PerCategoryOption, SuiteOption, ToMeasure

if TYPE_CHECKING:
    from layerskip.engine import Engine
    from search.baseline import TransformersBaseline
    from search.measure import Measurement

# What a search generates by default, for profiles that were never measured.
_DEFAULT_LENGTH = 48


def bench(
    profile: ProfileArgument,
    prompts: MeasuredPromptsOption = None,
    suite: SuiteOption = None,
    per_category: PerCategoryOption = None,
    repeats: RepeatsOption = 3,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of tokens for each prompt.", show_default="as in the profile's measurement", min=1
        ),
    ] = None,
    corpus: CorpusOption = None,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    engine: EngineOption = "auto",
    compiled: CompileOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure a draft profile on this machine: each prompt with plain decoding and with the draft, in turn."""
    from cli.progress import step_bar
    from layerskip import load_profile
    from layerskip.checkpoints import cache_folder
    from layerskip.engine import make_engine
    from layerskip.tokenizer import encode_corpus
    from search.baseline import measure_transformers
    from search.machine_lock import MachineLock
    from search.measure import MeasuringPlan, measure_drafters
    from studies.categories import COLUMNS, by_category

    quiet_libraries()
    loaded = load_profile(profile, device=device, dtype=dtype)
    to_measure = ToMeasure.read(prompts, suite, per_category)
    length = max_new_tokens or (loaded.measured.max_new_tokens if loaded.measured else _DEFAULT_LENGTH)
    layers, tokenizer = open_model_of(loaded, model, RunOptions(device, dtype, engine, compiled))
    drafter = loaded.drafter(layers, None if corpus is None else encode_corpus(tokenizer, corpus))
    runner = make_engine(layers, engine, in_place=True)
    lock = MachineLock(cache_folder(), layers.device)
    with lock.shared():  # a search may be measuring
        encoded = to_measure.encoded(runner, tokenizer, length)
    to_measure.announce(len(encoded), "with and without the draft", repeats)
    plan = MeasuringPlan(encoded, length, repeats)
    measured: dict[str, Measurement] = {}
    with step_bar("decoding", len(encoded) * repeats) as show_done:
        by_name = measure_drafters(runner, {"draft": drafter}, plan, lock)
        for done, measurements in enumerate(by_name, start=1):
            measured[measurements["draft"].prompt] = measurements["draft"]
            show_done(done)
    transformers = measure_transformers(runner, encoded, length, lock)
    categories = [] if suite is None else by_category(list(measured.values()), {p.id: p.category for p in encoded})
    result = {
        "profile": profile,
        "model": model or loaded.model.id,
        "repeats": repeats,
        "max_new_tokens": length,
        **_described(runner, list(measured.values())),
        "categories": [each.described() for each in categories],
        "transformers": None if transformers is None else asdict(transformers),
        "profile_measured": loaded.measured.model_dump() if loaded.measured else None,
    }
    if json:
        print_json(result)
    else:
        _report(result, transformers, to_measure.what)
        if categories:
            print_table(COLUMNS, (each.cells() for each in categories))


def _described(engine: Engine, measurements: list[Measurement]) -> dict[str, Any]:
    from layerskip.utils import device_name, dtype_name, library_versions
    from search.measure import mean_accepted_length, summarize

    return {
        "device": device_name(engine.model.device),
        "dtype": dtype_name(engine.model.dtype),
        "engine": engine.name,
        "versions": library_versions(),
        **asdict(summarize(measurements)),
        "drafted": sum(measurement.drafted for measurement in measurements),
        "mean_accepted": mean_accepted_length(measurements),
        "prompt_speedups": {measurement.prompt: measurement.speedup for measurement in measurements},
    }


def _report(result: dict[str, Any], transformers: TransformersBaseline | None, what: str) -> None:
    prompts = counted(result["prompts"], what)
    from studies.statistics import describe_disturbed

    stdout.print(f"profile   {result['profile']}, for {result['model']}")
    stdout.print(
        f"prompts   {prompts} of at most {counted(result['max_new_tokens'], 'token')}, {times_each(result['repeats'])}"
    )
    stdout.print(f"here      {result['device']}, {result['engine']}, {result['dtype']}")
    stdout.print(
        f"speed     {result['plain_tokens_per_second']:.1f} tokens/s plain, "
        f"{result['draft_tokens_per_second']:.1f} tokens/s self-speculative"
    )
    if result["acceptance_rate"] is None:
        stdout.print("accepted  nothing was drafted")
    else:
        stdout.print(
            f"accepted  {result['acceptance_rate']:.0%} of {counted(result['drafted'], 'drafted token')}, "
            f"{result['mean_accepted']:.2f} per round"
        )
    stdout.print(f"speedup   {describe_speedup(result)}")
    if transformers is not None:
        stdout.print(f"baseline  {transformers.describe(result['speedup'])}")
    recorded = result["profile_measured"]
    if recorded is None:
        stdout.print("recorded  none: the profile was never measured")
    else:
        stdout.print(
            f"recorded  {describe_speedup(recorded)} on {recorded['device']}, {recorded['dtype']}, "
            f"{counted(recorded['prompts'], recorded['prompt_set'] + ' prompt')}"
        )
    if note := no_gain_note(result):
        stdout.print(note)
    if result["disturbed"]:
        stdout.print(f"uncertain {describe_disturbed(result['disturbed'], result['prompts'])}")
    if result["near_ties"]:
        stderr.print(describe_near_ties(result["near_ties"]), style="dim")
