"""Small searches that the tests of this folder run."""

import random
from contextlib import contextmanager
from dataclasses import replace

from layerskip.costs import CostModel, Costs, PassCosts, StepCosts
from layerskip.engine import EagerEngine
from layerskip.fingerprint import identify
from search.callbacks import PhaseStarted
from search.prompts import EncodedPrompt, PromptSplit
from search.search import Search
from search.search_task import SearchTask
from search.settings import SearchSettings
from search.space import SearchSpace
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


QUICK = {"trials": 3, "max_new_tokens": 6, "prompts_per_trial": 3, "finalists": 2, "seed": 0, "measuring_share": 0.0}
# Parameters of the search and of its task; the others are settings.
_SEARCH = ("draft_layers", "on_event", "other_workers")
_TASK = ("space", "study", "folder")


def small_search(model, storage, *, prompts=None, **named):
    """A search of three trials that takes a fraction of a second on a tiny model; it measures finalists alone."""
    engine = named.pop("engine", None) or EagerEngine(model)
    own = {name: named.pop(name) for name in _SEARCH if name in named}
    task = {"space": SearchSpace(model.num_layers)} | {name: named.pop(name) for name in _TASK if name in named}
    settings = SearchSettings(**QUICK | named)
    return Search(
        engine, SearchTask(identify(model, MODEL_ID), prompts or random_prompts(), settings, **task), storage, **own
    )


def explore(search):
    """Let a search try its candidates and measure no finalists; the study."""
    study = search.open()
    search.explore(study, search.prepare(study))
    return study


def costs_after(context, *, scale=1.0, vocabularies=(0,)):
    """What parts cost on a machine where verification is cheap and the head is expensive."""
    step = StepCosts(
        fixed=1.0 * scale,
        attention=2.0 * scale,
        mlp=3.0 * scale,
        bridge=0.5 * scale,
        head={size: (4.0 if size == 0 else 4.0 * size / VOCABULARY) * scale for size in vocabularies},
    )
    sublayers = {width: (20 + width) * scale for width in range(1, 27)}
    return Costs(context, step, PassCosts(sublayers, dict.fromkeys(sublayers, 4.0 * scale)), context * scale)


def known_costs(space=None):
    """A cost model that is the same on every machine."""
    return known_costs_of(None, vocabularies=space.vocabulary_sizes if space else (), most_drafted=0)


def known_costs_of(engine, *, vocabularies, most_drafted, precisions=("full",)):
    """The same in the place of :func:`layerskip.engine.measure_costs`."""
    vocabularies = (0, *vocabularies)
    near, far = (costs_after(c, scale=1e-3 * (1 + c / 1000), vocabularies=vocabularies) for c in (8, 48))
    lower = [precision for precision in precisions if precision != "full"]

    def with_copies(costs):
        return replace(costs, copies={precision: half_of(costs.step) for precision in lower})

    return CostModel(with_copies(near), with_copies(far))


def half_of(step):
    """What parts cost where all take half the time."""
    head = {size: cost / 2 for size, cost in step.head.items()}
    return StepCosts(step.fixed / 2, step.attention / 2, step.mlp / 2, step.bridge / 2, head)


def records(storage, study, *, prompt_set=None, trial=None):
    """What was recorded, of one prompt set or of one trial alone if asked."""
    return [
        record
        for record in storage.records.of(study)
        if prompt_set in (None, record.prompt_set) and trial in (None, record.trial)
    ]


def ratio(measurements):
    """Plain ÷ self-speculative seconds, each for one token, of all measurements together."""
    plain = sum(m.plain_seconds for m in measurements) / sum(m.tokens for m in measurements)
    draft = sum(m.draft_seconds for m in measurements) / sum(m.draft_tokens for m in measurements)
    return plain / draft


def kind_of(event):
    """The type of an event, or the phase that it begins."""
    return event.phase if isinstance(event, PhaseStarted) else type(event)


class Log:
    """Keeps the events of a search."""

    def __init__(self):
        self.events = []

    def __call__(self, event):
        self.events.append(event)

    def of(self, kind):
        """The events of a type, or those that begin a phase."""
        return [event for event in self.events if kind_of(event) == kind]


class CtrlC(Log):
    """Presses Ctrl-C at the ``count``-th event of a type, or that begins a phase."""

    def __init__(self, kind, count=1):
        super().__init__()
        self._kind, self._count = kind, count

    def __call__(self, event):
        super().__call__(event)
        if kind_of(event) == self._kind and len(self.of(self._kind)) == self._count:
            raise KeyboardInterrupt


@contextmanager
def widths_disagree(model):
    """Break a model: passes over several tokens see the opposite of what passes over one token see.

    Self-speculative decoding then really generates another text than plain decoding.
    """
    norm = model.hf_model.model.norm
    handle = norm.register_forward_pre_hook(lambda _, inputs: (-inputs[0],) if inputs[0].shape[1] > 1 else None)
    try:
        yield
    finally:
        handle.remove()
