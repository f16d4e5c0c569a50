"""Small searches that the tests of this folder run."""

import random
from contextlib import contextmanager

from layerskip import identify
from search.prompts import EncodedPrompt, PromptSplit
from search.study import Search, SearchObserver, SearchSettings
from studies.records import measurements_of
from tests.models import VOCABULARY

MODEL_ID = "makers/Tiny Model"


def encoded_prompt(name, tokens):
    return EncodedPrompt(str(name), tuple(tokens))


def random_prompts(*, search=3, held_out=2, length=5, seed=0):
    """A split of random prompts, no two alike."""
    source = random.Random(seed)
    made = [
        encoded_prompt(f"p{seed}-{number}", source.choices(range(VOCABULARY), k=length))
        for number in range(search + held_out)
    ]
    return PromptSplit(tuple(made[:search]), tuple(made[search:]))


def small_search(model, storage, *, prompts=None, study_name=None, observer=None, space=None, **settings):
    """A search of three trials that takes a fraction of a second on a tiny model."""
    quick = {"trials": 3, "max_new_tokens": 6, "prompts_per_trial": 3, "finalists": 2, "seed": 0}
    return Search(
        model,
        identify(model, MODEL_ID),
        prompts or random_prompts(),
        storage,
        SearchSettings(**quick | settings),
        study_name=study_name,
        observer=observer,
        space=space,
    )


def records(storage, study, *, prompt_set=None, trial=None):
    """What was recorded, of one prompt set or of one trial alone if asked."""
    return [
        record
        for record in measurements_of(storage.engine, study)
        if prompt_set in (None, record.prompt_set) and trial in (None, record.trial)
    ]


def ratio(measurements):
    """Plain ÷ self-speculative seconds, each for one token, of all measurements together."""
    plain = sum(m.plain_seconds for m in measurements) / sum(m.tokens for m in measurements)
    draft = sum(m.draft_seconds for m in measurements) / sum(m.draft_tokens for m in measurements)
    return plain / draft


class Log(SearchObserver):
    """Keeps what a search says, as (event, its numbers)."""

    def __init__(self):
        self.events = []

    def study_opened(self, name, completed):
        self.events.append(("study_opened", name, completed))

    def reference_begins(self, prompts):
        self.events.append(("reference_begins", prompts))

    def prompt_measured(self, number, total):
        self.events.append(("prompt_measured", number, total))

    def trial_finished(self, completed, trial, best):
        self.events.append(("trial_finished", completed, trial.number, best))

    def finalists_chosen(self, count):
        self.events.append(("finalists_chosen", count))

    def finalist_measured(self, number, trial, speedup):
        self.events.append(("finalist_measured", number, trial.number, speedup))


class CtrlC(Log):
    """Presses Ctrl-C at the ``count``-th event of a name."""

    def __init__(self, event, count=1):
        super().__init__()
        self._at, self._left = event, count

    def __getattribute__(self, name):
        handler = super().__getattribute__(name)
        if name != "_at" and name == self._at:
            return lambda *arguments: self._handle(handler, arguments)
        return handler

    def _handle(self, handler, arguments):
        handler(*arguments)
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt


@contextmanager
def widths_disagree(model):
    """Break a model: passes over several tokens see the opposite of what passes over one token see.

    Decoding self-speculatively then really gives another text than decoding plainly.
    """
    norm = model.hf_model.model.norm
    handle = norm.register_forward_pre_hook(lambda _, inputs: (-inputs[0],) if inputs[0].shape[1] > 1 else None)
    try:
        yield
    finally:
        handle.remove()
