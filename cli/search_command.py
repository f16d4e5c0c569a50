"""``layerskip search``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import completion
from cli.common import (
    DEFAULT_STORAGE,
    INTERRUPTED,
    CompileOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    JsonOption,
    ModelArgument,
    StorageOption,
    check_writable,
    counted,
    describe_speedup,
    no_gain_note,
    print_json,
    quiet_libraries,
    stderr,
    stdout,
)
from search.settings import SAMPLERS

if TYPE_CHECKING:
    from layerskip.profile import DraftProfile
    from search.search import SearchResult


def search(
    model: ModelArgument = "smollm2",
    trials: Annotated[int, typer.Option(help="Candidates that the study shall have looked at in the end.")] = 200,
    timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds of looking at candidates; preparation and finalists are not counted.", show_default="no limit"
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts, one a line, or .jsonl with 'prompt' or 'messages'.", show_default="32 built-in ones"
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt.")] = 48,
    prompts_per_trial: Annotated[int, typer.Option(help="Prompts that a measured candidate decodes.")] = 6,
    finalists: Annotated[int, typer.Option(help="Best candidates to measure again on held-out prompts.")] = 3,
    sampler: Annotated[
        str,
        typer.Option(
            help="Who proposes candidates: tpe, greybox, gp, nsga2 or random.",
            autocompletion=completion.one_of(*SAMPLERS),
        ),
    ] = "tpe",
    workers: Annotated[int, typer.Option(help="Processes that search together on this machine.")] = 1,
    devices: Annotated[
        str | None,
        typer.Option(help="Devices for the workers, such as cuda:0,cuda:1; one worker each.", show_default="--device"),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(
            help="Name of the study; the same name goes on.",
            show_default="from model and settings",
            autocompletion=completion.studies,
        ),
    ] = None,
    storage: StorageOption = DEFAULT_STORAGE,
    out: Annotated[Path, typer.Option(help="Where to write the draft profile.")] = Path("draft_profile.json"),
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    engine: EngineOption = "eager",
    compiled: CompileOption = False,
    seed: Annotated[
        int | None, typer.Option(help="Makes the proposals repeatable.", show_default="a new one each time")
    ] = None,
    bridges: Annotated[bool, typer.Option(help="Try bridges in place of runs of skipped sublayers.")] = True,
    draft_vocabulary: Annotated[bool, typer.Option(help="Try drafts that score the likeliest tokens only.")] = True,
    gate: Annotated[bool, typer.Option(help="Try to draft nothing where the target model is unsure.")] = True,
    branches: Annotated[bool, typer.Option(help="Try drafts that propose several tokens for a place.")] = True,
    ngrams: Annotated[bool, typer.Option(help="Try to copy from the text before the model drafts.")] = True,
    stand_in: Annotated[
        list[str] | None,
        typer.Option(
            "--stand-in",
            metavar="PROFILE",
            help="Try the trained stand-in of a profile of 'layerskip tune', too; may be repeated.",
            show_default=False,
            autocompletion=completion.profiles,
        ),
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Search a model for a skip set, and save the best as a draft profile.

    Ctrl-C keeps every finished trial and writes the best profile measured so far; the same command goes on where it
    stopped.
    """
    from cli.progress import SearchProgress
    from layerskip import load_checkpoint
    from layerskip.checkpoints import resolve_device
    from layerskip.engine import check_engine
    from layerskip.fingerprint import identify
    from layerskip.tokenizer import read_prompts
    from search.draft_layers import trained_draft_layers
    from search.loading import engine_of, load_for_worker, load_profiles
    from search.prompts import built_in_prompts, split_prompts
    from search.search import Search, SearchTask
    from search.settings import SearchSettings
    from search.space import SearchSpace
    from search.workers import Workers
    from studies.storage import open_storage

    quiet_libraries()
    check_writable(out)
    places = [place.strip() for place in devices.split(",")] if devices else [device] * max(workers, 1)
    for place in set(places):
        check_engine(engine, resolve_device(place))
    settings = SearchSettings(
        trials=trials,
        timeout=timeout,
        max_new_tokens=max_new_tokens,
        prompts_per_trial=prompts_per_trial,
        finalists=finalists,
        sampler=sampler,
        workers=_num_workers(places, workers),
        seed=seed,
    )
    chosen = read_prompts(prompts) if prompts else built_in_prompts()
    profiles = load_profiles(stand_in or (), device, dtype)
    database = open_storage(storage)
    stderr.print(f"loading {model}")
    checkpoint = load_checkpoint(model, device=places[0], dtype=dtype)
    first = engine_of(checkpoint.model, engine, compiled)
    split = split_prompts(
        chosen, checkpoint.tokenizer, max_new_tokens=max_new_tokens, context_length=first.model.context_length
    )
    draft_layers = trained_draft_layers(profiles, first.model)
    space = SearchSpace.of(
        first.model,
        bridges=bridges,
        vocabularies=draft_vocabulary,
        target_confidence=gate,
        trees=branches,
        prompt_lookup=ngrams,
        draft_layers=[layer.ref for layer in draft_layers],
    )
    task = SearchTask(identify(first.model, checkpoint.source), split, settings, space, study)

    def workers_on(task: SearchTask) -> Workers:
        loads = [
            partial(load_for_worker, model, place, dtype, engine, compiled, tuple(stand_in or ()))
            for place in places[1:]
        ]
        return Workers(
            loads,
            task,
            storage,
            lambda number, message: stderr.print(f"worker {number} gave up: {message}", markup=False),
        )

    with SearchProgress(trials, timeout) as progress:
        search = Search(first, task, database, draft_layers=draft_layers, on_event=progress, helpers=workers_on)
        result = search.run()
    if result.profile is not None:
        result.profile.save(out)
    _report(result, out, json)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


def _num_workers(places: list[str], workers: int) -> int:
    from layerskip.errors import InvalidInputError

    if workers < 1:
        raise InvalidInputError(f"workers: expected at least 1, got {workers}")
    if workers not in (1, len(places)):
        raise InvalidInputError(
            f"--workers {workers}: --devices names {len(places)}, one for each worker; leave --workers out"
        )
    return len(places) or workers


def _report(result: SearchResult, out: Path, json: bool) -> None:
    measured = result.profile.measured if result.profile else None
    if json:
        print_json(
            {
                "profile": str(out) if result.profile else None,
                "study": result.study,
                "trials": result.trials,
                "measured": result.measured,
                "speedup": measured.speedup if measured else None,
                "speedup_low": measured.speedup_low if measured else None,
                "speedup_high": measured.speedup_high if measured else None,
                "prompt_set": measured.prompt_set if measured else None,
                "near_ties": measured.near_ties if measured else None,
                "interrupted": result.interrupted,
            }
        )
        return
    if result.profile is None:
        why = "it ended before a candidate was measured" if result.trials else "no trial was completed"
        stdout.print(f"study {result.study}: {why}, so there is no profile; run the same command again")
        return
    _report_profile(result.profile, result, out)


def _report_profile(profile: DraftProfile, result: SearchResult, out: Path) -> None:
    measured = profile.measured
    assert measured is not None  # a search always measures
    rate = "nothing drafted" if measured.acceptance_rate is None else f"{measured.acceptance_rate:.0%} accepted"
    stdout.print(f"study     {result.study}, {counted(result.trials, 'candidate')} seen, {result.measured} measured")
    stdout.print(f"skipped   {profile.skip_set}")
    stdout.print(f"draft     {profile.draft}; {rate}")
    prompts = counted(measured.prompts, f"{measured.prompt_set} prompt")
    stdout.print(
        f"speedup   {describe_speedup(measured.model_dump())} on {prompts}: "
        f"{measured.plain_tokens_per_second:.1f} → {measured.speculative_tokens_per_second:.1f} tokens/s"
    )
    if measured.near_ties:
        ties = counted(measured.near_ties, "output")
        stdout.print(f"near-ties {ties} parting where the model's two best tokens are as good as tied")
    stdout.print(f"profile   {out}")
    if not profile.pays:
        stdout.print(
            "No candidate beat plain decoding. The profile has the best one with its true figure; "
            "'layerskip apply' will decode plainly with it unless told --force."
        )
    elif doubt := no_gain_note(measured.model_dump()):
        stdout.print(doubt)
    if result.interrupted:
        stdout.print("Interrupted: the same command goes on where it stopped.")
