"""Which trials are best, by what was measured or else predicted."""

import optuna
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState, create_trial

from studies.ranking import (
    basis_of,
    best_trials,
    candidate_key,
    completed_trials,
    correction_of,
    evaluated_trials,
    finalists,
    fully_measured_trials,
    measured_trials,
    speedup_of,
)

CHOICE = CategoricalDistribution(tuple("abcdz"))
SPEEDUPS = st.sampled_from([0.5, 0.9, 1.0, 1.1, 2.0])
tried = st.lists(
    st.tuples(st.sampled_from("abcd"), st.none() | SPEEDUPS, st.sampled_from(["predicted", "measured"])), max_size=10
)


def study_of(drawn):
    """A study of (candidate, speedup or None for failed, basis)."""
    study = optuna.create_study(direction="maximize")
    for choice, value, basis in drawn:
        study.add_trial(created(choice, value, {"basis": basis}))
    return study


def created(choice, value, attributes):
    return create_trial(
        state=TrialState.FAIL if value is None else TrialState.COMPLETE,
        value=value,
        params={"choice": choice},
        distributions={"choice": CHOICE},
        user_attrs=attributes,
    )


def test_what_was_found_hopeless_goes_last_whatever_its_few_prompts_say():
    study = study_of([("a", 0.9, "predicted"), ("b", 1.0, "measured")])
    study.add_trial(created("c", 2.0, {"basis": "measured", "stopped_early": True, "predicted_speedup": 1.0}))
    assert [trial.params["choice"] for trial in best_trials(study, 3)] == ["b", "a", "c"]
    assert correction_of(study) == 1


@given(tried, st.integers(1, 5), st.none() | st.sampled_from([0.25, 1.0, 3.0]))
@settings(max_examples=60)
def test_the_best_are_different_candidates_by_their_measurement_or_else_their_corrected_prediction(drawn, count, off):
    """Predictions are corrected by how far they were off where a candidate was measured."""
    correction = 1.0 if off is None else off
    study = study_of(drawn)
    if off is not None:
        study.add_trial(created("z", 1.0, {"basis": "measured", "predicted_speedup": 1 / off}))
        drawn = [*drawn, ("z", 1.0, "measured")]
    worth = {}
    for basis, factor in (("predicted", correction), ("measured", 1.0)):  # a measurement overwrites what was predicted
        by_candidate = {}
        for choice, value, this in drawn:
            if value is not None and this == basis:
                by_candidate.setdefault(choice, []).append(value)
        worth |= {choice: (max(values) * factor, basis) for choice, values in by_candidate.items()}
    best = best_trials(study, count)
    assert len({candidate_key(trial) for trial in best}) == len(best) == min(count, len(worth))
    expected = sorted((value for value, _ in worth.values()), reverse=True)[:count]
    for trial, value in zip(best, expected, strict=True):
        found, basis = worth[trial.params["choice"]]
        assert basis_of(trial) == basis
        assert found == value
        assert speedup_of(trial) * (correction if basis == "predicted" else 1.0) == value


@given(tried, st.integers(1, 5))
@settings(max_examples=30)
def test_finalists_are_the_best_and_always_the_one_measured_to_be_fastest(drawn, count):
    study = study_of(drawn)
    best, chosen = best_trials(study, count), finalists(study, count)
    assert len({candidate_key(trial) for trial in chosen}) == len(chosen) == len(best)
    assert chosen[:-1] == best[:-1]
    measured = fully_measured_trials(study)
    if measured:
        highest = max(map(speedup_of, measured))
        fastest = {candidate_key(trial) for trial in measured if speedup_of(trial) == highest}
        assert fastest & set(map(candidate_key, chosen))
    else:
        assert chosen == best


@given(tried)
@settings(max_examples=30)
def test_a_completed_trial_either_predicted_a_candidate_or_measured_it(drawn):
    study = study_of(drawn)
    seen, measured = ({trial.number for trial in kind(study)} for kind in (evaluated_trials, measured_trials))
    assert not seen & measured
    assert seen | measured == {trial.number for trial in completed_trials(study)}
    assert len(seen | measured) == sum(value is not None for _, value, _ in drawn)


def test_a_trial_that_says_nothing_was_measured():
    assert basis_of(create_trial(value=1.0)) == "measured"
