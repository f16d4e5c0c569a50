"""``layerskip search``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from json import dumps
from pathlib import Path
from shlex import quote
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
    RunOptions,
    StorageOption,
    check_writable,
    counted,
    describe_bfloat16,
    interrupted_by_sigterm,
    open_model,
    print_json,
    print_measured_profile,
    quiet_libraries,
    stderr,
    stdout,
)
from layerskip.errors import InvalidInputError
from layerskip.names import PRECISIONS, Precision
from search.settings import SAMPLERS

if TYPE_CHECKING:
    from layerskip.profile import DraftProfile
    from search.search_result import SearchResult
    from search.workers import Workers

# What may make a draft pay where none does.
_WHAT_HELPS = (
    "prompts of yours that repeat themselves (--prompts), drafts at every --precision, heads that 'layerskip tune' "
    "trains, a larger model, or a GPU in place of a CPU"
)


def search(
    model: ModelArgument,
    trials: Annotated[int, typer.Option(help="Total candidates to evaluate, earlier runs included.")] = 200,
    timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds to evaluate candidates for; preparation and finalists come on top.",
            show_default="no limit",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts, one per line, or .jsonl with 'prompt' or 'messages'.", show_default="32 built-in ones"
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt.")] = 48,
    prompts_per_trial: Annotated[int, typer.Option(help="Prompts that a measured candidate decodes.")] = 6,
    finalists: Annotated[int, typer.Option(help="Best candidates to measure on held-out prompts.")] = 3,
    sampler: Annotated[
        str,
        typer.Option(help=f"Proposes candidates: {', '.join(SAMPLERS)}.", autocompletion=completion.one_of(*SAMPLERS)),
    ] = "tpe",
    workers: Annotated[int, typer.Option(help="Processes that search together on this machine.")] = 1,
    devices: Annotated[
        str | None,
        typer.Option(help="Devices of the workers, such as cuda:0,cuda:1; one each.", show_default="--device"),
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(
            help="Name of the study; an existing one is resumed.",
            show_default="from model and settings",
            autocompletion=completion.studies,
        ),
    ] = None,
    storage: StorageOption = DEFAULT_STORAGE,
    out: Annotated[Path, typer.Option(help="File to write the draft profile to.")] = Path("draft_profile.json"),
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    engine: EngineOption = "auto",
    compiled: CompileOption = False,
    seed: Annotated[
        int | None, typer.Option(help="Seed for reproducible proposals.", show_default="a new one each time")
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            help="Precision of drafts: full, int8 or int4; repeatable. Lower ones keep rounded copies of the weights.",
            show_default="all that run here",
            autocompletion=completion.one_of(*PRECISIONS),
        ),
    ] = None,
    bridges: Annotated[bool, typer.Option(help="Try bridges in place of runs of skipped sublayers.")] = True,
    draft_vocabulary: Annotated[bool, typer.Option(help="Try drafts that score only the most frequent tokens.")] = True,
    target_confidence: Annotated[
        bool, typer.Option(help="Try not drafting where the target's confidence is below a threshold.")
    ] = True,
    trees: Annotated[bool, typer.Option(help="Try token trees: drafts with several tokens for a position.")] = True,
    prompt_lookup: Annotated[
        bool, typer.Option(help="Try copying from the text, by prompt lookup, before the model drafts.")
    ] = True,
    draft_layer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PROFILE",
            help="Also try the trained draft layer of a profile from 'layerskip tune'; repeatable.",
            show_default=False,
            autocompletion=completion.profiles,
        ),
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Search a model for the fastest draft, and save it as a draft profile.

    Ctrl-C, or SIGTERM, keeps all finished trials and writes the best profile measured so far; the same command resumes
    the search.
    """
    import optuna

    from cli.progress import ProgressDisplay
    from layerskip.checkpoints import resolve_device
    from layerskip.engine import check_engine, make_engine, seconds_saved_by_bfloat16
    from layerskip.fingerprint import identify
    from layerskip.tokenizer import read_prompts
    from search.draft_layers import trained_draft_layers
    from search.loading import load_for_worker, load_profiles
    from search.prompts import HOLD_OUT_EVERY, built_in_prompts, split_prompts
    from search.search import Search
    from search.search_task import SearchTask
    from search.settings import SearchSettings
    from search.space import SearchSpace
    from search.workers import Workers
    from studies.statistics import FEWEST_PROMPTS
    from studies.storage import check_storage, open_storage

    quiet_libraries()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    check_writable(out)
    places = _places(workers, devices, device)
    for place in set(places):
        check_engine(engine, resolve_device(place))
    chosen = _precisions(precision or ())
    settings = SearchSettings(
        trials=trials,
        timeout=timeout,
        max_new_tokens=max_new_tokens,
        prompts_per_trial=prompts_per_trial,
        finalists=finalists,
        sampler=sampler,
        workers=len(places),
        seed=seed,
    )
    given = read_prompts(prompts) if prompts else built_in_prompts()
    tuned = load_profiles(draft_layer or (), device, dtype)
    check_storage(storage)
    stderr.print(f"loading {model}")
    options = RunOptions(places[0], dtype, engine, compiled)
    layers, tokenizer = open_model(model, options)
    for each in chosen:
        layers.copies.check(each)
    identity = identify(layers, model)
    split = split_prompts(given, tokenizer, max_new_tokens=max_new_tokens, context_length=layers.context_length)
    trained = trained_draft_layers(tuned, layers)
    space = SearchSpace.of(
        layers,
        precisions=chosen or None,
        bridges=bridges,
        vocabularies=draft_vocabulary,
        target_confidence=target_confidence,
        trees=trees,
        prompt_lookup=prompt_lookup,
        draft_layers=[layer.ref for layer in trained],
    )
    if len(split.held_out) < FEWEST_PROMPTS:
        stderr.print(
            f"{counted(len(split.held_out), 'prompt')} held out, too few to show a gain: "
            f"that takes {FEWEST_PROMPTS}, of {HOLD_OUT_EVERY * FEWEST_PROMPTS} prompts"
        )
    database = open_storage(storage)  # not before: what is mistyped leaves no empty file
    saved = seconds_saved_by_bfloat16(layers)  # of plain weights, which are packed now
    runner = make_engine(layers, engine, in_place=True)
    task = SearchTask(identity, split, settings, space, study)

    def workers_on(task: SearchTask) -> Workers:
        sources = tuple(draft_layer or ())
        loads = [partial(load_for_worker, model, place, dtype, runner.name, compiled, sources) for place in places[1:]]
        return Workers(loads, task, storage, lambda number, error: stderr.print(f"worker {number} failed: {error}"))

    with interrupted_by_sigterm(), ProgressDisplay(trials, timeout) as progress:
        result = Search(
            runner,
            task,
            database,
            draft_layers=trained,
            on_event=progress,
            other_workers=workers_on,
        ).run()
    if result.profile is not None:
        result.profile.save(out)
    _report(result, ProfileUse(out, options, runner.name), storage, saved, json)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


def _precisions(wanted: Sequence[str]) -> list[Precision]:
    """The precisions that were named, in order; none for all that run here."""
    for precision in wanted:
        if precision not in PRECISIONS:
            raise InvalidInputError(f"precision '{precision}' is unknown; expected {', '.join(PRECISIONS)}")
    return [precision for precision in PRECISIONS if precision in wanted]


def _places(workers: int, devices: str | None, device: str) -> list[str]:
    """The device of each worker."""
    if workers < 1:
        raise InvalidInputError(f"workers: expected at least 1, got {workers}")
    if devices is None:
        return [device] * workers
    places = [place.strip() for place in devices.split(",")]
    if workers not in (1, len(places)):
        raise InvalidInputError(
            f"--workers {workers}: --devices names {len(places)}, one for each worker; leave --workers out"
        )
    return places


@dataclass(frozen=True)
class ProfileUse:
    """How a new profile is used.

    Args:
        file: The profile.
        options: How passes ran, as it was asked for.
        engine: The engine that this came to.
    """

    file: Path
    options: RunOptions
    engine: str

    def lines(self) -> list[str]:
        """For the shell, for Python and for transformers."""
        from layerskip.engine import PackedEngine

        asked = {"--device": self.options.device, "--dtype": self.options.dtype, "--engine": self.options.engine}
        given = "".join(f" {name} {value}" for name, value in asked.items() if value != "auto")
        given += " --compile" * self.options.compiled
        path = dumps(str(self.file), ensure_ascii=False)
        # What transformers decodes with is packed on request alone: that takes the model's memory again.
        packed = ', engine="packed"' * (self.engine == PackedEngine.name)
        return [
            f'apply     layerskip apply {quote(str(self.file))} "your prompt"{given}',
            f"Python    drafter = DraftProfile.load({path}).drafter(model)  # all of it: docs/python.md",
            f'          generate(model, ids, drafter=drafter, engine=make_engine(model, "{self.options.engine}"))',
            "or        hf_model.generate(**inputs, max_new_tokens=100, "
            f"custom_generate=layerskip.speculate({path}{packed}))  # docs/transformers.md",
        ]


def report_line(study: str, storage: str) -> str:
    """For the shell: the report of a study."""
    from studies.storage_errors import redacted

    option = "" if storage == completion.usual_storage() else f" --storage {quote(redacted(storage))}"
    return f"report    layerskip report {quote(study)}{option}"


def _report(result: SearchResult, use: ProfileUse, storage: str, saved: float | None, json: bool) -> None:
    profile = result.profile
    bfloat16 = None
    if profile is not None and profile.measured is not None:
        bfloat16 = describe_bfloat16(profile.measured.plain_tokens_per_second, saved)
    if json:
        figures = ("speedup", "speedup_low", "speedup_high", "prompt_set", "near_ties", "disturbed")
        print_json(
            {
                "profile": None if profile is None else str(use.file),
                "study": result.study,
                "trials": result.trials,
                "measured": result.measured,
                **{figure: getattr(profile and profile.measured, figure, None) for figure in figures},
                "transformers": None if result.transformers is None else asdict(result.transformers),
                "full_precision": None if result.full_precision is None else asdict(result.full_precision),
                "bfloat16": bfloat16,
                "why_slower": None if result.shortfall is None else result.shortfall.describe(),
                "interrupted": result.interrupted,
            }
        )
    elif profile is None:
        why = "the search ended before a candidate was measured" if result.trials else "no trial was completed"
        stdout.print(f"study {result.study}: no profile, because {why}; the same command resumes the search")
    else:
        _report_profile(profile, result, use.file)
        if bfloat16:
            stdout.print(f"bfloat16  {bfloat16}")
        if profile.pays:
            for line in use.lines():
                stdout.print(line)
        stdout.print(report_line(result.study, storage))
        if result.interrupted:
            stdout.print("Interrupted: the same command resumes the search.")


def _report_profile(profile: DraftProfile, result: SearchResult, out: Path) -> None:
    measured = profile.measured
    assert measured is not None  # a search always measures
    rate = "nothing drafted" if measured.acceptance_rate is None else f"{measured.acceptance_rate:.0%} accepted"
    evaluated = counted(result.trials, "candidate")
    stdout.print(f"study     {result.study}, {evaluated} evaluated, {result.measured} measured in trials")
    stdout.print(f"skipped   {profile.skip_set}")
    stdout.print(f"draft     {profile.draft}; {rate}")
    print_measured_profile(profile, out, "No candidate beat plain decoding; the profile is that of the best one.")
    if result.transformers is not None:
        stdout.print(f"baseline  {result.transformers.describe(measured.speedup)}")
    full = result.full_precision
    if full is not None and profile.precision != "full":
        draft = full.draft if full.speedup > 1 else "no faster than plain decoding"
        stdout.print(f"full      the best at full precision is {full.speedup:.2f}×: {draft} (trial {full.trial})")
    if result.shortfall is not None:
        stdout.print(f"why       {result.shortfall.describe()}")
        stdout.print(f"try       {_WHAT_HELPS}")
