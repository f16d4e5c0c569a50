"""The draft vocabulary of a trained draft: the tokens that the full model says in the texts it learns from."""

from __future__ import annotations

import torch
from torch import Tensor

from layerskip.drafts.vocabulary import draft_vocabulary, emission_frequencies
from layerskip.stack.model import LayerSkipModel
from layerskip.tuning.data import Shards

# Positions whose probabilities are summed up; of all others only the choice counts.
_POSITIONS = 4096


def vocabulary_of(model: LayerSkipModel, shards: Shards, size: int) -> Tensor:
    """The ids of a draft vocabulary, ascending, ``[size]``.

    Args:
        model: The full model.
        shards: What it wrote; held-out texts do not count.
        size: Tokens wanted, at most ``vocab_size``.
    """
    counts = torch.zeros(model.vocab_size)
    states: list[Tensor] = []
    share = max(shards.positions // _POSITIONS, 1)
    for text in shards.learned(shards.paths):
        counts += text.choices[text.asked].bincount(minlength=model.vocab_size)
        states.append(text.after[text.asked][::share])
    some = torch.cat(states)[:_POSITIONS].to(model.device, model.dtype)
    frequencies = emission_frequencies(model, some).cpu() + counts
    return draft_vocabulary(frequencies, model.eos_token_ids, size)
