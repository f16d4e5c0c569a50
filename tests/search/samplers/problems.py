"""Small problems for samplers: costs that are known, and damages that are to be found."""

import math

import optuna

from search.samplers import Draft, DraftChoices


class LinearCosts:
    """A draft step costs its head and what it keeps; a module's class, so that it can be pickled."""

    def __init__(self, sublayers, *, head=0.2, bridge=0.02, width=0.01):
        self.sublayers, self.head, self.bridge, self.width = tuple(sublayers), head, bridge, width

    def draft_step_cost(self, mask, bridged, vocabulary, stand_in):
        kept = sum(cost for cost, skip in zip(self.sublayers, mask, strict=True) if not skip)
        trained = max(self.sublayers) * bool(stand_in)
        return (self.head / 2 if vocabulary else self.head) + kept + trained + self.bridge * (bridged and any(mask))

    def verification_cost(self, width):
        return 1 + self.width * (width - 1)


def even_costs(bits):
    return LinearCosts([0.8 / bits] * bits)


def bits(count):
    return tuple(f"skip_{index}" for index in range(count))


def run(study, choices, trials, acceptance, *, fails=(), prunes=()):
    """Trials that note their acceptance rate; their value is of no interest to whoever knows it."""

    def objective(trial):
        parameters = {name: trial.suggest_categorical(name, d.choices) for name, d in choices.distributions.items()}
        trial.set_user_attr("acceptance", acceptance(choices.draft(parameters)))
        if trial.number in fails:
            raise RuntimeError
        if trial.number in prunes:
            raise optuna.TrialPruned
        return 1.0

    study.optimize(objective, n_trials=trials, catch=RuntimeError)
    return [choices.draft(trial.params) for trial in study.trials]


def acceptance_by(damages, *, mended=0.5, exits=(), trained=3.0):
    """An additive problem: α of a draft from what leaving out each sublayer, and having a stand-in, does."""

    def acceptance(draft: Draft):
        below = zip(damages, draft.mask[: exits[draft.stand_in - 1] if draft.stand_in else None], strict=False)
        total = sum(damage for damage, skip in below if skip)
        extra = 0.02 * bool(draft.vocabulary) + trained * bool(draft.stand_in)
        return math.exp(-total * (mended if draft.bridged else 1) - extra)

    return acceptance


ALL_KINDS = [
    DraftChoices(bits(6)),
    DraftChoices(bits(6), bridges=True),
    DraftChoices(bits(6), bridges=True, vocabularies=(0, 8, 16)),
    DraftChoices(bits(6), vocabularies=(8, 16)),
    DraftChoices(bits(6), exits=(3,)),
    DraftChoices(bits(6), bridges=True, vocabularies=(0, 8), exits=(2, 5)),
]
