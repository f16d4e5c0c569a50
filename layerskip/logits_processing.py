"""Choose tokens under transformers' logits processors and stopping criteria, which look at the text so far.

The target model's logits at each position are processed with that position's own text, one position after the other and
only as far as drafted tokens are accepted. Every processor and criterion is therefore called with the arguments that
``generate``'s own loop would give it, once a token and in the same order, so that those with a state work too. Drafts
are processed as well, because they are then accepted more often, but only by processors that are known to have none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from layerskip.engine import DraftStep
from layerskip.errors import InvalidInputError
from layerskip.sampling import (
    Draft,
    Draw,
    GreedySampler,
    RandomSampler,
    Sampler,
    Verdict,
    check_numbers,
    highest,
    sample,
    speculative_choice,
)

# They look at each row of scores alone, whatever the text and whichever tokens the columns belong to.
_WARPERS = frozenset(
    {
        EpsilonLogitsWarper,
        EtaLogitsWarper,
        InfNanRemoveLogitsProcessor,
        LogitNormalization,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        TypicalLogitsWarper,
    }
)
# Functions of text and scores: calling them with a text that is then rejected changes nothing.
_STATELESS = _WARPERS | {
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
}


@contextmanager
def _as_in_generate() -> Iterator[None]:
    """Ordinary tensors without gradients, as ``generate`` has them: a caller's code may keep and change them."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class GenerationHistory:
    """The text of one generation, as processors and criteria see it.

    Args:
        prompt: ``[1, n]``, token ids.
        criteria: Decide after each new token whether the text is over.
        keep_scores: Keep the processed scores of each position.
        keep_logits: Keep the target model's logits of each position.

    Attributes:
        ids: ``[1, n + new]``, prompt and new tokens.
        new: Number of new tokens.
        over: Whether the newest token ended the text.
        scores: ``[1, vocab_size]`` for each new token; None if they are not kept.
        logits: Likewise.
    """

    def __init__(
        self, prompt: Tensor, criteria: StoppingCriteriaList, *, keep_scores: bool = False, keep_logits: bool = False
    ) -> None:
        self.ids = prompt
        self.new = 0
        self.over = False
        self.scores: tuple[Tensor, ...] | None = () if keep_scores else None
        self.logits: tuple[Tensor, ...] | None = () if keep_logits else None
        self._criteria = criteria

    @property
    def device(self) -> torch.device:
        """Where processors and criteria work: the prompt's device."""
        return self.ids.device

    def keep(self, logits: Tensor, scores: Tensor) -> None:
        """Keep the logits and scores by which the next token is chosen, each ``[1, vocab_size]``."""
        if self.logits is not None:
            self.logits += (logits,)
        if self.scores is not None:
            self.scores += (scores,)

    def append(self, token: Tensor) -> None:
        """Add a token, ``[1]``, and ask the criteria."""
        self.ids = torch.cat([self.ids, token[None]], dim=-1)
        self.new += 1
        self.over = bool(self._criteria(self.ids, self.scores).all())

    def ends_after(self, tokens: Sequence[int]) -> bool:
        """The stop rule for decoding: whether the text ends with these new tokens, which become the history's."""
        if len(tokens) > self.new:
            with _as_in_generate():
                self.append(torch.tensor(tokens[-1:], device=self.device))
        return self.over and len(tokens) == self.new


class ProcessorSampler:
    """Chooses by logits that processors have changed, each with the text before it.

    Args:
        history: Grows by each token of the text.
        processors: Applied in turn, as in ``generate``.
        generator: Source of randomness on the history's device, to draw from the softmax of the processed scores; None
            takes the highest score.
        vocab_size: Columns of the target model's logits.
    """

    def __init__(
        self,
        history: GenerationHistory,
        processors: LogitsProcessorList,
        generator: torch.Generator | None,
        vocab_size: int,
    ) -> None:
        self._history = history
        self._processors = processors
        self._draft_processors = LogitsProcessorList([p for p in processors if type(p) in _STATELESS])
        self._generator = generator
        self._vocab_size = vocab_size
        self._drafted: list[Tensor] = []  # of this round, the first token of each place, [1]

    def draw(self, logits: Tensor) -> Draw:
        with _as_in_generate():
            token = self._next(None, logits)
        return Draw(token.to(logits.device), None)

    def draft(self, step: DraftStep, token_ids: Tensor | None, count: int = 1, *, path: Tensor | None = None) -> Draw:
        """Drawn from the whole vocabulary; outside the draft's it has probability 0, unless a processor forces it."""
        with _as_in_generate():
            logits = step.logits.clone()
            if token_ids is not None:
                logits = logits.new_full((self._vocab_size,), -torch.inf).index_copy_(0, token_ids, logits)
            before = self._drafted if path is None else [path.to(self._history.device)]
            text = torch.cat([self._history.ids, *(tokens[None] for tokens in before)], dim=-1)
            scores = self._draft_processors(text, logits[None].to(text.device))  # type: ignore[arg-type]
            # Processors may leave no token of the draft's vocabulary. The distribution is then not a number, which
            # speculative sampling knows.
            draw = self._draft_by(scores[0], min(count, len(step.logits)))
            self._drafted.append(draw.tokens[:1])
        return Draw(draw.tokens.to(step.logits.device), draw.distribution)

    def _draft_by(self, scores: Tensor, count: int) -> Draw:
        if self._generator is None:
            return Draw(scores.topk(count).indices, None)
        distribution = scores.softmax(-1)
        return Draw(sample(distribution, self._generator, count), distribution)

    def verify(self, draft: Draft, logits: Tensor) -> Verdict:
        self._drafted = []
        proposed = draft.tokens.tolist()
        siblings = self._siblings(draft)
        rows, tokens = [0], []
        with _as_in_generate():
            while True:
                newest = self._next(siblings.get(rows[-1]), logits[rows[-1]])
                tokens += newest.tolist()
                following = draft.tree.children.get(rows[-1], ())
                accepted = [row for row in following if proposed[row - 1] == tokens[-1]]
                if self._history.over or not accepted:
                    return Verdict(tokens, newest.to(logits.device), tuple(rows))
                rows.append(accepted[0])

    def _siblings(self, draft: Draft) -> dict[int, Draw]:
        """The drafted tokens after each row that any follow."""
        tokens = draft.tokens.to(self._history.device)
        drafted = zip(draft.tree.children.items(), draft.distributions, strict=True)
        return {row: Draw(tokens[[child - 1 for child in children]], q) for (row, children), q in drafted}

    def _next(self, drafted: Draw | None, logits: Tensor) -> Tensor:
        """The text's next token, ``[1]``, by the target model's logits, ``[vocab_size]``; appended to the history."""
        row = logits[None].to(self._history.device, copy=True)
        scores: Tensor = self._processors(self._history.ids, row)  # type: ignore[arg-type]
        self._history.keep(row, scores)
        token = self._choose(drafted, scores[0])
        self._history.append(token)
        return token

    def _choose(self, drafted: Draw | None, scores: Tensor) -> Tensor:
        """A token, ``[1]``, by the target model's scores; a drafted one if it is accepted."""
        if self._generator is None:
            best = highest(scores[None])
            check_numbers(best.tolist())
            return best
        distribution = scores.softmax(-1)
        if distribution.isnan().any():
            raise InvalidInputError(
                "logits processors: left nothing to draw from, every score is -inf or one is not a number; "
                "relax what they forbid"
            )
        if drafted is None:
            return sample(distribution, self._generator)
        drawn_from = drafted.distribution
        if drawn_from is None:  # certain
            drawn_from = torch.full_like(distribution, torch.nan)
        return speculative_choice(drafted.tokens, drawn_from, distribution, self._generator)


@dataclass(frozen=True)
class ProcessorSampling:
    """How ``generate`` chooses tokens: by processors, then greedily or by drawing from the softmax of the scores.

    Args:
        history: The text, its criteria, and the scores to keep.
        processors: In ``generate``'s order; temperature, top-k and top-p are among them.
        do_sample: Draw; otherwise the highest score wins.
        vocab_size: Columns of the target model's logits.
    """

    history: GenerationHistory
    processors: LogitsProcessorList
    do_sample: bool
    vocab_size: int

    @property
    def needs_history(self) -> bool:
        """Whether choosing needs the text, or keeps scores; otherwise whole rounds are decided in one step."""
        if self.history.scores is not None or self.history.logits is not None:
            return True
        return not all(self.do_sample and type(processor) in _WARPERS for processor in self.processors)

    def sampler(self, device: torch.device) -> Sampler:
        """A fresh sampler for one generation; drawing repeats after ``torch.manual_seed``."""
        if self.needs_history:
            generator = _generator(self.history.device) if self.do_sample else None
            return ProcessorSampler(self.history, self.processors, generator, self.vocab_size)
        return RandomSampler(self.processors, _generator(device)) if self.do_sample else GreedySampler()


def _generator(device: torch.device) -> torch.Generator:
    """A new generator on the device, seeded by torch's global one."""
    return torch.Generator(device).manual_seed(int(torch.randint(2**63 - 1, ())))
