"""Texts as the full model writes them, several decoded side by side by transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig

from layerskip.stack.model import LayerSkipModel


@torch.inference_mode()
def continuations(
    model: LayerSkipModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, temperature: float = 0.0
) -> list[list[int]]:
    """The full model's continuations of several prompts, decoded side by side by transformers.

    Args:
        model: The model.
        prompts: Token ids.
        max_new_tokens: Most new tokens for each.
        temperature: 0 is greedy; above, tokens are sampled with torch's own random state.

    Returns:
        The new tokens of each; an end-of-sequence token is the last of them.
    """
    longest = max(map(len, prompts))
    eos = sorted(model.eos_token_ids)
    padding = eos[0] if eos else 0
    rows = [[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    seen = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(
        **(sampled if temperature else {"do_sample": False}),
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos or None,
        pad_token_id=padding,
    )
    out: Tensor = model.hf_model.generate(  # type: ignore[operator]
        torch.tensor(rows, device=model.device),
        attention_mask=torch.tensor(seen, device=model.device),
        generation_config=settings,
    )
    return [_until_end(row[longest:], model.eos_token_ids) for row in out.tolist()]


def _until_end(tokens: list[int], eos: frozenset[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(tokens) if token in eos), len(tokens))
    return tokens[:end]
