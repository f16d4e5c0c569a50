"""``layerskip doctor``."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import completion
from cli.common import (
    DEFAULT_STORAGE,
    DONE,
    FAILED,
    DebugOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    JsonOption,
    RunOptions,
    StorageOption,
    counted,
    describe_bfloat16,
    open_model,
    print_json,
    quiet_libraries,
    stderr,
    stdout,
)
from layerskip.errors import LayerSkipError, first_line

if TYPE_CHECKING:
    import torch

    from search.break_even import BreakEven


# What speed and results depend on; an installed layerskip is not needed where a checkout is on the path.
_PACKAGES = ("layerskip", "torch", "transformers", "optuna")


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Also measure whether speculation can pay for this model: alias, Hub id, folder or .gguf file.",
            show_default=False,
            autocompletion=completion.models,
        ),
    ] = None,
    storage: StorageOption = DEFAULT_STORAGE,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    engine: EngineOption = "auto",
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Check what layerskip runs on: versions, devices, cache, database and, with a model, what speculation can gain.

    The exit status is 1 if a package is missing that layerskip cannot do without, or the cache cannot be written.
    """
    versions = _versions()
    missing = [name for name, installed in versions.items() if installed is None and name != "layerskip"]
    problems = [f"the package '{name}' is not installed" for name in missing]
    result: dict[str, Any] = {
        "ok": not missing,
        "versions": versions,
        "devices": _attempt(_devices, [], problems),
        "dtype": _attempt(lambda: _dtype_advice(device, dtype), {}, problems),
        "cache": _attempt(_cache, {}, problems),
        "storage": _attempt(lambda: _storage(storage), {}, problems),
        "problems": list(dict.fromkeys(problems)),
        "model": None,
    }
    if result["cache"] and not result["cache"]["writable"]:
        result["ok"] = False
        folder = result["cache"]["folder"]
        result["problems"].append(f"cache folder {folder}: not writable; set LAYERSKIP_CACHE to a folder that is")
    runs = not missing and bool(result["dtype"])  # else the device or the type that was asked for is not there
    result["ok"] = result["ok"] and (model is None or runs)
    for problem in result["problems"]:
        stderr.print(f"layerskip: {problem}")
    if not json:
        _report(result)
    if model is not None and runs:
        break_even, saved = _measured(model, RunOptions(device, dtype, engine))
        result["model"] = {
            "model": model,
            **asdict(break_even),
            "can_pay": break_even.can_pay,
            "verdict": verdict(break_even),
            "bfloat16_step_seconds": None if saved is None else break_even.step_seconds - saved,
        }
        if not json:
            _report_break_even(break_even, saved)
    elif not json and model is None and not missing:
        stdout.print("model       'layerskip doctor MODEL' measures whether speculation can pay for it here")
    if json:
        print_json(result)
    raise typer.Exit(DONE if result["ok"] else FAILED)


def _attempt(check: Callable[[], Any], otherwise: Any, problems: list[str]) -> Any:
    """The result of a check; one that fails, for instance because of a broken package, adds to the problems."""
    try:
        return check()
    except Exception as error:  # report a failing check, never raise
        problems.append(first_line(error))
        return otherwise


def _versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter; None where one is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def _devices() -> list[dict[str, Any]]:
    from layerskip.utils import devices

    return [asdict(device) for device in devices()]


def _dtype_advice(device: str, dtype: str) -> dict[str, Any]:
    from layerskip.checkpoints import resolve_device, resolve_dtype
    from layerskip.utils import dtype_name

    where = resolve_device(device)
    chosen = resolve_dtype(dtype, where)
    return {"device": str(where), "dtype": dtype_name(chosen), "advice": _advice(where.type, chosen)}


def _advice(device_type: str, dtype: torch.dtype) -> str:
    import torch

    from layerskip.packed_linear import has_kernels_for

    if dtype != torch.float32:
        return "near-ties may be resolved differently, with or without a draft"
    if device_type == "cuda":
        gain = "bfloat16 is about twice as fast"
    elif has_kernels_for(torch.bfloat16):
        gain = "'layerskip doctor MODEL' measures what bfloat16 would gain"
    else:
        gain = "there are no packed kernels for bfloat16 here"
    return f"output is identical to plain decoding; {gain}"


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
    from studies.storage import is_there, open_existing_storage, redacted
    from studies.study import list_studies

    quiet_libraries()
    found: dict[str, Any] = {"url": redacted(url), "reachable": True}
    try:
        if not is_there(url):
            return found | {"studies": 0, "state": "does not exist yet; a search creates it"}
        return found | {"studies": len(list_studies(open_existing_storage(url))), "state": "reachable"}
    except LayerSkipError as error:
        return found | {"reachable": False, "studies": None, "state": str(error)}


def _measured(model: str, options: RunOptions) -> tuple[BreakEven, float | None]:
    """Whether speculation can pay, and the seconds that a plain step would save in bfloat16."""
    from layerskip.checkpoints import cache_folder
    from layerskip.engine import make_engine, seconds_saved_by_bfloat16
    from search.break_even import measure_break_even
    from search.machine_lock import MachineLock

    quiet_libraries()
    layers, _ = open_model(model, options)
    stderr.print(f"measuring what passes of {model} cost here; this takes about a minute", style="dim")
    with MachineLock(cache_folder(), layers.device).exclusive():
        saved = seconds_saved_by_bfloat16(layers)  # of plain weights, which are packed now
        return measure_break_even(make_engine(layers, options.engine, in_place=True)), saved


def _report(result: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {installed or 'missing'}" for name, installed in result["versions"].items())
    stdout.print(f"versions    {versions}")
    for device in result["devices"]:
        stdout.print(f"device      {device['name']}: {device['description']}")
    if result["dtype"]:
        stdout.print("dtype       {dtype} on {device}: {advice}".format(**result["dtype"]))
    if cache := result["cache"]:
        used, free = (cache[name] / 2**30 for name in ("bytes", "free_bytes"))
        advice = "" if cache["writable"] else "; not writable: set LAYERSKIP_CACHE to a folder that is"
        stdout.print(f"cache       {cache['folder']}: {used:.1f} GiB, {free:.1f} GiB free{advice}")
    if database := result["storage"]:
        stdout.print("studies     {url}: {state}".format(**database))


def _report_break_even(result: BreakEven, saved: float | None) -> None:
    costs = " · ".join(f"{tokens}: {cost:.2f}" for tokens, cost in result.verification.items())
    stdout.print(f"step        {result.step_seconds * 1000:.1f} ms, {1 / result.step_seconds:.1f} tokens/s")
    if advice := describe_bfloat16(1 / result.step_seconds, saved):
        stdout.print(f"bfloat16    {advice}")
    stdout.print(f"v(k)        cost of verifying k tokens, in plain steps: {costs}")
    for draft in result.drafts:
        point = "never breaks even"
        if draft.break_even is not None:
            point = f"breaks even at {draft.break_even:.0%} accepted, {counted(draft.length, 'token')} a draft"
        rates = ", ".join(f"{rate:.0%}: {value:.2f}×" for rate, value in draft.speedups.items())
        stdout.print(f"draft       {draft.draft}: {draft.cost:.2f} of a step, {point} ({rates})")
    stdout.print(verdict(result))


def verdict(result: BreakEven) -> str:
    """Whether speculation can pay, in a sentence."""
    best = result.best
    if best is None:
        return (
            "Speculation cannot pay for this model here: no typical draft is faster, even if every token is accepted."
        )
    rate = f"at least {best.break_even:.0%} of its tokens are accepted, at {counted(best.length, 'token')} a draft"
    if not result.can_pay:
        return f"Speculation is unlikely to pay for this model here: a draft ({best.draft}) pays only if {rate}."
    return f"Speculation can pay for this model here if {rate} (draft: {best.draft}); only a search can tell."
