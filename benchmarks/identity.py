"""Whether self-speculative decoding gives the tokens of plain greedy decoding, over many tokens.

python -m benchmarks.identity
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.setting import load_setting, loaded_profiles, machine_of, write_json
from layerskip import generate
from layerskip.errors import LosslessnessError
from search.measure import diverges_at_near_tie

console = Console(highlight=False, width=150)


def main(
    model: str = "smollm2",
    profile: Annotated[
        list[Path] | None, typer.Option(help="A draft profile; may be repeated. None takes the ready one.")
    ] = None,
    device: str = "auto",
    dtype: str = "float32",
    tokens: int = 10_000,
    max_new_tokens: int = 512,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Decode prompt after prompt both ways until there are enough tokens; a text counts up to where it diverges."""
    setting = load_setting(model, device=device, dtype=dtype, prompts=32, max_new_tokens=max_new_tokens)
    prompts = (*setting.prompts, *setting.search)
    profiles = loaded_profiles(profile or [], model, device=device, dtype=dtype)
    drafters = {name: draft.drafter(setting.model) for name, draft in profiles.items()}
    found = {name: {"tokens": 0, "near_ties": 0, "different": 0} for name in drafters}
    for prompt in prompts:
        if min(counts["tokens"] for counts in found.values()) >= tokens:
            break
        plain = generate(setting.model, prompt.tokens, engine=setting.engine, max_new_tokens=max_new_tokens).tokens
        for name, drafter in drafters.items():
            own = generate(
                setting.model, prompt.tokens, engine=setting.engine, drafter=drafter, max_new_tokens=max_new_tokens
            ).tokens
            same = next((at for at, (a, b) in enumerate(zip(plain, own, strict=False)) if a != b), len(plain))
            found[name]["tokens"] += same
            try:
                found[name]["near_ties"] += diverges_at_near_tie(setting.model, prompt, plain, own)
            except LosslessnessError as error:
                found[name]["different"] += 1
                console.print(f"{name}: {error}")
        console.print(found)
    if min(counts["tokens"] for counts in found.values()) < tokens:
        console.print(f"the {len(prompts)} prompts are used up; raise --max-new-tokens")
    write_json(json, {"machine": machine_of(setting.model), "model": model, "figures": found})


if __name__ == "__main__":
    typer.run(main)
