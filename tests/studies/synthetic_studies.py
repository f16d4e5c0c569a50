"""Studies with known contents, written through the real storage as a search writes them."""

import json
import math
import random
from datetime import datetime, timedelta

from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState, create_trial

from layerskip import SkipSet
from layerskip.costs import best_speedup
from layerskip.drafting.config import DraftConfig
from studies.ranking import PREDICTED_HERE_KEY, best_trials, prediction_of, speedup_of
from studies.records import MeasurementRecord
from studies.study import COSTS_KEY, SINGLE_SUBLAYER_KEY, StudyContext, open_study

BEGAN = datetime(2026, 3, 4, 12, 0)
VOCABULARIES = (0, 8192, 16384)
PARTS = {"fixed": 0.004, "attention": 0.0004, "mlp": 0.001, "bridge": 0.0001}
SOURCES = (
    "nothing skipped",
    "evenly spaced: both, 25.0% of the inner layers",
    "least damage: 4 of 60 sublayers, by acceptance of each alone",
    "least change: 4 of 60 sublayers, by cosine similarity",
    "dynamic programming: 6.2% of the cost, by cosine similarity",
    "early exit: after 28 of 30 layers",
    "published: LLaMA-2-13B",
)


def context_of(layers, model="makers/tiny"):
    space = {"num_layers": layers, "max_draft_length": 8, "bridges": True, "vocabulary_sizes": list(VOCABULARIES)}
    return StudyContext(model, "0123456789abcdef", "float32", "a processor, 2 threads", "p", 48, 6, space)


def costs_of(layers):
    """The JSON of a cost model of a machine where verifying is cheap."""
    plain = PARTS["fixed"] + layers * (PARTS["attention"] + PARTS["mlp"]) + 0.01
    step = PARTS | {"head": {"0": 0.01, "8192": 0.002, "16384": 0.004}}
    sublayers = {str(k): (plain - 0.01) * (1 + 0.04 * (k - 1)) for k in (1, 2, 4, 8, 12)}
    costs = {"step": step, "passes": {"sublayers": sublayers, "head": dict.fromkeys(sublayers, 0.01)}, "prefill": 0.1}
    return json.dumps({"short": {"context": 64} | costs, "long": {"context": 512} | costs})


def log_rejection(layers, seed=0):
    """−ln α without each sublayer; the first ones are needed."""
    source = random.Random(seed)
    return [source.expovariate(60) + 1.5 * (i < 2) + 0.2 * (i == 2 * layers - 1) for i in range(2 * layers)]


class StudyBuilder:
    """Builds a study step by step.

    Args:
        storage: Where it lives.
        name: Its name.
        layers: Layers of the model.
        seed: Of all random choices.
    """

    def __init__(self, storage, name="s", *, layers=6, seed=0, model="makers/tiny"):
        self.storage, self.name, self.layers = storage, name, layers
        self.study = open_study(storage, name, context_of(layers, model))
        self.random = random.Random(seed)
        self.damage = log_rejection(layers, seed)
        self.trials = []  # reading them from the storage again and again takes long

    def with_costs(self):
        self.study.set_user_attr(COSTS_KEY, costs_of(self.layers))
        return self

    def with_single_sublayers(self):
        masks = ([i == skipped for i in range(2 * self.layers)] for skipped in range(2 * self.layers))
        rates = {str(SkipSet.from_mask(m)): math.exp(-d) for m, d in zip(masks, self.damage, strict=True)}
        self.study.set_user_attr(SINGLE_SUBLAYER_KEY, rates)
        return self

    def predict(self, count):
        """Predict random candidates, the first of them warm starts; all are pruned."""
        for number in range(len(self.trials), len(self.trials) + count):
            share = 0.0 if number == 0 else self.random.choice((0.1, 0.2, 0.4))
            tried = [trial.params for trial in self.trials]
            while (parameters := self._parameters(share)) in tried:
                pass
            proposer = {"source": SOURCES[number]} if number < len(SOURCES) else {"sampler": "tpe"}
            attributes, speedup = self._prediction(parameters)
            self._add(number, parameters, attributes | proposer, speedup)
        return self

    def measure(self, count, *, stopped=False, off=0.9, off_here=None):
        """Measure the best that were not measured yet; measured speedups are ``off`` times the predicted ones.

        And ``off_here`` times those that were predicted for the same prompts, where that is known.
        """
        done = [trial.params for trial in self.trials if "revisits" in trial.user_attrs]
        predicted = [trial for trial in self.trials if trial.params not in done]
        for trial in sorted(predicted, key=prediction_of, reverse=True)[:count]:
            number, value = len(self.trials), off * prediction_of(trial)
            own = {"source": f"trial {trial.number}, to be measured", "revisits": trial.number, "speedup": value}
            attributes = trial.user_attrs | own | {"speedup_low": 0.9 * value, "speedup_high": 1.1 * value}
            attributes.pop("sampler", None)
            if off_here is not None:
                attributes[PREDICTED_HERE_KEY] = value / off_here
            self._add(number, trial.params, attributes, prediction_of(trial), value, stopped=stopped)
            self._record(number, "search", value, 6)
        return self

    def measure_finalists(self, count, *, off=0.95):
        """Measure the best on held-out prompts."""
        for trial in best_trials(self.study, count):
            self._record(trial.number, "held-out", off * speedup_of(trial), 8)
        return self

    def _parameters(self, share):
        """A candidate that skips about this share of the sublayers, and never the last."""
        mask = [*(self.random.random() < share for _ in self.damage[1:]), False]
        kinds = [f"skip_{kind}_{layer:02}" for layer in range(self.layers) for kind in ("attn", "mlp")]
        chosen = dict(zip(kinds, map(int, mask), strict=True))
        return chosen | {"bridges": self.random.random() < 0.5, "vocabulary_size": self.random.choice(VOCABULARIES)}

    def _prediction(self, parameters):
        mask = [value for name, value in parameters.items() if name.startswith("skip")]
        rate = math.exp(-sum(d for d, skip in zip(self.damage, mask, strict=True) if skip)) * 0.98
        cost = 1 - 0.9 * sum(mask) / len(mask) - 0.1 * bool(parameters["vocabulary_size"])
        speedup = best_speedup(rate, cost, lambda k: 1 + 0.04 * (k - 1), 8) * self.random.uniform(0.9, 1.0)
        size = parameters["vocabulary_size"]
        config = DraftConfig(SkipSet.from_mask(mask), parameters["bridges"], vocabulary_size=size)
        attributes = {
            "config": config.to_json(),
            "skip_set": str(config.skip_set),
            "draft": config.details,
            "acceptance": rate,
            "draft_cost": cost,
        }
        return attributes, speedup

    def _add(self, number, parameters, attributes, predicted, measured=None, *, stopped=False):
        choices = {"bridges": (False, True), "vocabulary_size": VOCABULARIES}
        began = BEGAN + timedelta(seconds=number)
        complete = measured is not None and not stopped
        prompts = {} if measured is None else dict.fromkeys(range(1, 4 if stopped else 7), measured)
        trial = create_trial(
            state=TrialState.COMPLETE if complete else TrialState.PRUNED,
            value=measured if complete else None,
            params=parameters,
            distributions={name: CategoricalDistribution(choices.get(name, (0, 1))) for name in parameters},
            user_attrs=attributes,
            intermediate_values={0: predicted} | prompts,
        )
        trial.datetime_start, trial.datetime_complete = began, began + timedelta(seconds=1)
        trial.number = number
        self.study.add_trial(trial)
        self.trials.append(trial)

    def _record(self, trial, prompt_set, speedup, count):
        for prompt in range(count):
            plain = 2 + self.random.random()
            draft = plain / (speedup * self.random.uniform(0.85, 1.15))
            counts = {"tokens": 48, "draft_tokens": 48, "drafted": 60, "accepted": 50, "near_tie": False}
            self.storage.records.add(
                MeasurementRecord(
                    study=self.name,
                    trial=trial,
                    prompt=f"{prompt_set[0]}{prompt}",
                    prompt_set=prompt_set,
                    plain_seconds=plain,
                    draft_seconds=draft,
                    **counts,
                )
            )


def searched_study(storage, name="s", **options):
    """A study at its end, with everything that there is to draw."""
    builder = StudyBuilder(storage, name, **options).with_costs().with_single_sublayers()
    return builder.predict(25).measure(4).measure(1, stopped=True, off=0.5).measure_finalists(3)
