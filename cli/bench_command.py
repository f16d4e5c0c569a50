"""``layerskip bench``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.common import (
    CompileOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    JsonOption,
    MeasuredPromptsOption,
    ModelOption,
    ProfileArgument,
    RepeatsOption,
    counted,
    describe_speedup,
    no_gain_note,
    print_json,
    quiet_libraries,
    stderr,
    stdout,
)

if TYPE_CHECKING:
    from layerskip import DraftProfile
    from layerskip.engine import Engine
    from search.measure import Measurement, MeasuringPlan

# What a search generates by default, for a profile that does not say what it was measured with.
_DEFAULT_LENGTH = 48


def bench(
    profile: ProfileArgument,
    prompts: MeasuredPromptsOption = None,
    repeats: RepeatsOption = 3,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Most tokens for each prompt.", show_default="as the profile was measured", min=1),
    ] = None,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    engine: EngineOption = "eager",
    compiled: CompileOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure a draft profile here: the same prompts plainly and with its draft, in turn."""
    from cli.decoding import load_for
    from cli.progress import Steps
    from layerskip import load_profile
    from layerskip.checkpoints import cache_folder
    from layerskip.tokenizer import read_prompts
    from search.loading import engine_of
    from search.machine_lock import MachineLock
    from search.measure import MeasuringPlan, measure_drafter
    from search.prompts import prompts_to_measure

    quiet_libraries()
    loaded = load_profile(profile, device=device, dtype=dtype)
    own = read_prompts(prompts) if prompts else None
    length = max_new_tokens or (loaded.measured.max_new_tokens if loaded.measured else _DEFAULT_LENGTH)
    checkpoint = load_for(loaded, model, device=device, dtype=dtype, engine=engine)
    runner = engine_of(checkpoint.model, engine, compiled)
    layers = runner.model
    drafter = loaded.drafter(layers)
    chosen = prompts_to_measure(own, checkpoint.tokenizer, max_new_tokens=length, context_length=layers.context_length)
    plan = MeasuringPlan(chosen, length, repeats)
    measured: dict[str, Measurement] = {}
    with Steps("decoding", len(chosen) * repeats) as steps:
        measurements = measure_drafter(runner, drafter, plan, MachineLock(cache_folder(), layers.device))
        for done, measurement in enumerate(measurements, start=1):
            measured[measurement.prompt] = measurement
            steps.done(done)
    described = _described(profile, loaded, list(measured.values()), plan, runner)
    if json:
        print_json(described)
        return
    _report(described, own is None)


def _described(
    source: str,
    profile: DraftProfile,
    measurements: list[Measurement],
    plan: MeasuringPlan,
    engine: Engine,
) -> dict[str, Any]:
    from layerskip.utils import device_name, library_versions
    from search.measure import mean_accepted_length, summarize

    layers = engine.model
    return {
        "profile": source,
        "model": profile.model.id,
        "device": device_name(layers.device),
        "dtype": str(layers.dtype).removeprefix("torch."),
        "engine": engine.name,
        "versions": library_versions(),
        "repeats": plan.repeats,
        "max_new_tokens": plan.max_new_tokens,
        **asdict(summarize(measurements)),
        "drafted": sum(measurement.drafted for measurement in measurements),
        "mean_accepted": mean_accepted_length(measurements),
        "prompt_speedups": {measurement.prompt: measurement.speedup for measurement in measurements},
        "profile_measured": profile.measured.model_dump() if profile.measured else None,
    }


def _report(described: dict[str, Any], built_in: bool) -> None:
    prompts = counted(described["prompts"], "held-out built-in prompt" if built_in else "prompt")
    times = f"{described['repeats']} times each" if described["repeats"] > 1 else "once each"
    stdout.print(f"profile   {described['profile']}, for {described['model']}")
    stdout.print(f"prompts   {prompts} of at most {counted(described['max_new_tokens'], 'token')}, {times}")
    stdout.print(f"here      {described['device']}, {described['dtype']}")
    stdout.print(
        f"speed     {described['plain_tokens_per_second']:.1f} tokens/s plain, "
        f"{described['draft_tokens_per_second']:.1f} tokens/s self-speculative"
    )
    if described["acceptance_rate"] is None:
        stdout.print("accepted  nothing was drafted")
    else:
        stdout.print(
            f"accepted  {described['acceptance_rate']:.0%} of {counted(described['drafted'], 'drafted token')}, "
            f"{described['mean_accepted']:.2f} a round"
        )
    stdout.print(f"speedup   {describe_speedup(described)}")
    theirs = described["profile_measured"]
    if theirs is None:
        stdout.print("profile's none: it was never measured")
    else:
        stdout.print(
            f"profile's {describe_speedup(theirs)} on {theirs['device']}, {theirs['dtype']}, "
            f"{counted(theirs['prompts'], theirs['prompt_set'] + ' prompt')}"
        )
    if doubt := no_gain_note(described):
        stdout.print(doubt)
    if described["near_ties"]:
        ties = counted(described["near_ties"], "output")
        stderr.print(f"{ties} parting where the model's two best tokens are as good as tied", style="dim")
