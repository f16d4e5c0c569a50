"""``layerskip doctor``."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING, Annotated, Any

import typer
from packaging.requirements import InvalidRequirement, Requirement

from cli import completion
from cli.options import (
    DEFAULT_STORAGE,
    DebugOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    JsonOption,
    StorageOption,
)
from cli.output import DONE, FAILED, counted, print_json, quiet_libraries, stderr, stdout

if TYPE_CHECKING:
    from search.break_even import BreakEven


# The extras of people who use layerskip, and what each is for; the others are for who develops it.
EXTRAS = {
    "gguf": "GGUF files, among them the default model's",
    "dashboard": "the Optuna dashboard",
    "postgres": "studies in PostgreSQL",
}


@dataclass(frozen=True)
class Package:
    """One package that layerskip needs, or that an extra brings.

    Args:
        name: Its name.
        needed: The versions that layerskip works with, such as ``>=2.11``.
        installed: The version that is installed; None if none is.
        fits: Whether that one is among them.
        extra: The extra that brings it; None if layerskip cannot do without it.
    """

    name: str
    needed: str
    installed: str | None
    fits: bool
    extra: str | None


def packages() -> list[Package]:
    """The packages that layerskip needs, and those of its extras."""
    try:
        lines = requires("layerskip") or []
    except PackageNotFoundError:  # a checkout on the path, not installed
        lines = []
    found = (_package(line, extra) for line in lines for extra in (None, *EXTRAS))
    return [package for package in found if package is not None]


def python_version() -> Package:
    """Python itself."""
    installed = platform.python_version()
    needed = Requirement("python>=3.11")
    return Package("python", str(needed.specifier), installed, needed.specifier.contains(installed, True), None)


def _package(line: str, extra: str | None) -> Package | None:
    """A requirement, if it is one of layerskip itself (extra None) or one that the extra adds."""
    try:
        requirement = Requirement(line)
    except InvalidRequirement:
        return None
    marker = requirement.marker
    wanted = marker is None if extra is None else marker is not None and _brings(requirement, extra)
    if not wanted:
        return None
    try:
        installed: str | None = version(requirement.name)
    except PackageNotFoundError:
        installed = None
    fits = installed is not None and requirement.specifier.contains(installed, prereleases=True)
    return Package(requirement.name, str(requirement.specifier), installed, fits, extra)


def _brings(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Also measure whether speculation can pay for this model: alias, hub id, folder or .gguf file.",
            show_default=False,
            autocompletion=completion.models,
        ),
    ] = None,
    storage: StorageOption = DEFAULT_STORAGE,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    engine: EngineOption = "eager",
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Look at what layerskip runs on: versions, devices, folders, the database and, with a model, what can be gained.

    The exit status is 1 where something is missing that layerskip cannot do without.
    """
    found = [python_version(), *packages()]
    broken = [package for package in found if package.extra is None and not package.fits]
    problems: list[str] = []
    result: dict[str, Any] = {
        "ok": not broken,
        "packages": [asdict(package) for package in found],
        "devices": _tried(_devices, [], problems),
        "dtype": _tried(lambda: _dtype_advice(device, dtype), {}, problems),
        "cache": _tried(_cache, {}, problems),
        "storage": _tried(lambda: _storage(storage), {}, problems),
        "problems": list(dict.fromkeys(problems)),
        "model": None,
    }
    for problem in result["problems"]:
        stderr.print(f"layerskip: {problem}")
    if not json:
        _report(found, result)
    if model is not None and not broken:
        payoff = _measured(model, device, dtype, engine)
        result["model"] = {"model": model, **asdict(payoff), "can_pay": payoff.can_pay, "verdict": verdict(payoff)}
        if not json:
            _report_payoff(payoff)
    elif not json and not broken:
        stdout.print("model       'layerskip doctor MODEL' measures whether speculation can pay for it here")
    if json:
        print_json(result)
    raise typer.Exit(FAILED if broken else DONE)


def _tried(look: Callable[[], Any], otherwise: Any, problems: list[str]) -> Any:
    """What is found; where it cannot be looked at, for instance because a package is missing, that is a problem."""
    try:
        return look()
    except Exception as error:  # a doctor does not fall ill of what is wrong
        problems.append((str(error).strip().splitlines() or [type(error).__name__])[0])
        return otherwise


def _devices() -> list[dict[str, Any]]:
    from layerskip.utils import devices

    return [asdict(device) for device in devices()]


def _dtype_advice(device: str, dtype: str) -> dict[str, Any]:
    from layerskip.checkpoints import resolve_device, resolve_dtype

    where = resolve_device(device)
    chosen = str(resolve_dtype(dtype, where)).removeprefix("torch.")
    return {"device": str(where), "dtype": chosen, "advice": _advice(where.type, chosen)}


def _advice(device_type: str, dtype: str) -> str:
    if dtype == "float32" and device_type == "cuda":
        return "the text is plain decoding's token for token; bfloat16 is about twice as fast"
    if dtype == "float32":
        return "the text is plain decoding's token for token"
    ties = "tokens that are as good as tied may come out differently, with or without a draft"
    if device_type == "cpu":
        return f"{ties}; many processors verify k tokens in k times the time, so that nothing is gained: try float32"
    return ties


def _cache() -> dict[str, Any]:
    from layerskip.checkpoints import cache_folder

    folder = cache_folder()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return {
        "folder": str(folder),
        "writable": there.is_dir() and os.access(there, os.W_OK),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "free_bytes": shutil.disk_usage(there).free,
    }


def _storage(url: str) -> dict[str, Any]:
    from layerskip.errors import LayerSkipError
    from studies.storage import is_there, open_existing_storage, redacted
    from studies.study import list_studies

    quiet_libraries()
    try:
        if not is_there(url):
            return {"url": redacted(url), "reachable": True, "studies": 0, "state": "not there yet; a search makes it"}
        studies = len(list_studies(open_existing_storage(url)))
    except LayerSkipError as error:
        return {"url": redacted(url), "reachable": False, "studies": None, "state": str(error)}
    return {"url": redacted(url), "reachable": True, "studies": studies, "state": "reachable"}


def _measured(model: str, device: str, dtype: str, engine: str) -> BreakEven:
    from layerskip.checkpoints import cache_folder, load_checkpoint, resolve_device
    from layerskip.engine import check_engine
    from search.break_even import measure_break_even
    from search.loading import engine_of
    from search.machine_lock import MachineLock

    quiet_libraries()
    check_engine(engine, resolve_device(device))
    runner = engine_of(load_checkpoint(model, device=device, dtype=dtype).model, engine, False)
    stderr.print(f"measuring what {model} costs here, which takes a minute or so", style="dim")
    with MachineLock(cache_folder(), runner.model.device).exclusive():
        return measure_break_even(runner)


def _report(found: list[Package], result: dict[str, Any]) -> None:
    needed = [package for package in found if package.extra is None]
    stdout.print("needed      " + ", ".join(_versioned(package) for package in needed))
    for extra, purpose in EXTRAS.items():
        brought = [package for package in found if package.extra == extra]
        if all(package.fits for package in brought):
            state = ", ".join(_versioned(package) for package in brought)
        else:
            lacking = ", ".join(_versioned(package) for package in brought if not package.fits)
            state = f"{lacking}; for {purpose}: pip install 'layerskip[{extra}]'"
        stdout.print(f"{extra:<11} {state}")
    for device in result["devices"]:
        stdout.print(f"device      {device['name']}: {device['description']}")
    if result["dtype"]:
        stdout.print("dtype       {dtype} on {device}: {advice}".format(**result["dtype"]))
    if cache := result["cache"]:
        used, free = (cache[name] / 2**30 for name in ("bytes", "free_bytes"))
        state = f"{used:.1f} GiB, {free:.1f} GiB free"
        closed = "" if cache["writable"] else "; not writable: set LAYERSKIP_CACHE to a folder that is"
        stdout.print(f"cache       {cache['folder']}: {state}{closed}")
    if database := result["storage"]:
        stdout.print("studies     {url}: {state}".format(**database))


def _versioned(package: Package) -> str:
    if package.installed is None:
        return f"{package.name} is missing ({package.needed} needed)"
    return f"{package.name} {package.installed}" + ("" if package.fits else f" does not fit {package.needed}")


def _report_payoff(payoff: BreakEven) -> None:
    costs = " · ".join(f"{tokens}: {cost:.2f}" for tokens, cost in payoff.verification.items())
    stdout.print(f"step        {payoff.step_seconds * 1000:.1f} ms, {1 / payoff.step_seconds:.1f} tokens/s")
    stdout.print(f"v(k)        verifying k tokens, in such steps: {costs}")
    for draft in payoff.drafts:
        even = "never breaks even" if draft.break_even is None else f"breaks even at {draft.break_even:.0%} accepted"
        even += "" if draft.break_even is None else f", {draft.length} a draft"
        rates = ", ".join(f"{rate:.0%}: {value:.2f}×" for rate, value in draft.speedups.items())
        stdout.print(f"draft       {draft.draft}: {draft.cost:.2f} of a step, {even} ({rates})")
    stdout.print(verdict(payoff))


def verdict(payoff: BreakEven) -> str:
    """Whether speculation can pay, in a sentence."""
    best = payoff.best
    if best is None:
        return (
            "Speculation cannot pay for this model here: no draft of these kinds is faster even if it is always right."
        )
    rate = f"at least {best.break_even:.0%} of the time, {counted(best.length, 'token')} a draft"
    if not payoff.can_pay:
        return f"Speculation will hardly pay for this model here: a draft ({best.draft}) would have to be right {rate}."
    return (
        f"Speculation can pay for this model here if a draft ({best.draft}) is right {rate}; only a search tells "
        "whether one is."
    )
