"""Creating, resuming, listing and ranking studies."""

import json
import re
from dataclasses import fields, replace

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState, create_trial

from layerskip.errors import InvalidInputError
from studies.records import MeasurementRecord
from studies.study import StudyContext, describe_study, list_studies, load_study, open_study

CONTEXT = StudyContext(
    model="makers/model",
    fingerprint="0123",
    dtype="float32",
    device="a processor, 2 threads",
    prompts="4567",
    max_new_tokens=48,
    prompts_per_trial=6,
    space={"num_layers": 4, "max_draft_length": 8},
)
OTHER_VALUES = {
    "model": "another/model",
    "fingerprint": "89ab",
    "dtype": "bfloat16",
    "device": "a GPU",
    "prompts": "cdef",
    "max_new_tokens": 64,
    "prompts_per_trial": 5,
    "space": {"num_layers": 4, "max_draft_length": 9},
}
CHOICE = CategoricalDistribution(tuple("abcdef"))


def as_recorded(context):
    return json.loads(json.dumps({field.name: getattr(context, field.name) for field in fields(context)}))


def add_trial(study, predicted, choice="a", *, measured=None, failed=False, **attrs):
    study.add_trial(
        create_trial(
            state=TrialState.FAIL if failed else TrialState.PRUNED if measured is None else TrialState.COMPLETE,
            value=measured,
            params={"choice": choice},
            distributions={"choice": CHOICE},
            intermediate_values={0: predicted} | ({} if measured is None else {1: measured}),
            user_attrs=attrs,
        )
    )


changes = st.dictionaries(st.sampled_from(sorted(OTHER_VALUES)), st.none()).map(
    lambda names: {name: OTHER_VALUES[name] for name in names}
)


@given(changes)
def test_contexts_differ_by_everything_but_the_models_id(changed):
    now = replace(CONTEXT, **changed)
    compared = [name for name in OTHER_VALUES if name in changed and name != "model"]
    differences = now.differences(as_recorded(CONTEXT))
    assert [difference.partition(" ")[0] for difference in differences] == compared
    assert sorted(differences) == sorted(
        f"{name} (study: {getattr(CONTEXT, name)}, now: {changed[name]})" for name in compared
    )


@given(changes, changes)
def test_contexts_have_one_digest_exactly_if_they_do_not_differ(one, other):
    first, second = replace(CONTEXT, **one), replace(CONTEXT, **other)
    assert (first.digest == second.digest) == (not first.differences(as_recorded(second)))


def test_the_digest_names_the_studies_that_earlier_versions_made():
    assert CONTEXT.digest == replace(CONTEXT, model="x").digest
    assert len(CONTEXT.digest) == 8
    assert set(CONTEXT.digest) <= set("0123456789abcdef")


def test_a_new_study_maximizes(storage):
    study = open_study(storage, "s", CONTEXT)
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    assert study.study_name == "s"


def test_opening_a_study_again_resumes_it(storage):
    add_trial(open_study(storage, "s", CONTEXT), 1.0)
    assert len(open_study(storage, "s", CONTEXT).trials) == 1
    assert len(open_study(storage, "s", replace(CONTEXT, model="moved/here")).trials) == 1
    assert len(optuna.get_all_study_names(storage)) == 1


@pytest.mark.parametrize("name", sorted(set(OTHER_VALUES) - {"model"}))
def test_resuming_under_other_conditions_is_refused_and_the_difference_named(storage, name):
    open_study(storage, "s", CONTEXT)
    with pytest.raises(InvalidInputError) as caught:
        open_study(storage, "s", replace(CONTEXT, **{name: OTHER_VALUES[name]}))
    message = str(caught.value)
    assert message.startswith("study 's': cannot be resumed, because this differs: ")
    assert f": {name} (study: {getattr(CONTEXT, name)}, now: {OTHER_VALUES[name]}). " in message
    assert "--study" in message
    assert "\n" not in message
    assert open_study(storage, "s", CONTEXT).study_name == "s"  # the refusal changed nothing


def refused_as_foreign(storage, name):
    with pytest.raises(InvalidInputError, match=r"was not made by this version of layerskip; .* --study$"):
        open_study(storage, name, CONTEXT)


def test_a_study_with_trials_that_something_else_made_is_refused(storage):
    add_trial(optuna.create_study(study_name="s", storage=storage, direction="maximize"), 1.0)
    refused_as_foreign(storage, "s")


@pytest.mark.parametrize("directions", [["minimize"], ["maximize", "minimize"], ["maximize", "maximize"]])
def test_an_empty_study_that_does_not_maximize_one_value_is_refused(storage, directions):
    optuna.create_study(study_name="s", storage=storage, directions=directions)
    with pytest.raises(InvalidInputError, match=r"was not made by this version of layerskip; .* --study$"):
        open_study(storage, "s", CONTEXT)


@pytest.mark.parametrize("recorded", [{"format": 1}, {"format": "2"}, {}])
def test_a_study_of_another_format_is_refused(storage, recorded):
    study = optuna.create_study(study_name="s", storage=storage, direction="maximize")
    study.set_user_attr("layerskip", recorded)
    refused_as_foreign(storage, "s")


def test_a_study_whose_search_was_killed_before_its_conditions_were_stored_can_be_resumed(storage):
    optuna.create_study(study_name="s", storage=storage, direction="maximize")
    open_study(storage, "s", CONTEXT)
    with pytest.raises(InvalidInputError):
        open_study(storage, "s", replace(CONTEXT, dtype="bfloat16"))


def test_loading_an_unknown_study_lists_those_that_are(storage):
    unknown = re.escape(f"study 'x': no such study in {storage.engine.url}; studies there: ")
    with pytest.raises(InvalidInputError, match=f"^{unknown}none; --storage names another database$"):
        load_study(storage, "x")
    for name in ("b", "a"):
        optuna.create_study(study_name=name, storage=storage)
    with pytest.raises(InvalidInputError, match=f"^{unknown}a, b$"):
        load_study(storage, "x")
    assert load_study(storage, "a").study_name == "a"


def test_studies_are_listed_by_name_with_what_came_of_them(storage):
    assert list_studies(storage) == []
    study = open_study(storage, "b", CONTEXT)
    for value, choice in [(0.9, "a"), (1.2, "b"), (1.1, "c")]:
        add_trial(study, value, choice)
    add_trial(study, 2.0, failed=True)
    study.enqueue_trial({"choice": "d"})  # not tried yet, so not counted
    optuna.create_study(study_name="a", storage=storage)

    def found():
        return [
            (s.name, s.model, s.trials, s.evaluated, s.measured, s.best_speedup, s.basis) for s in list_studies(storage)
        ]

    empty = ("a", None, 0, 0, 0, None, None)
    assert found() == [empty, ("b", "makers/model", 4, 3, 0, 1.2, "predicted")]
    add_trial(study, 1.2, "b", measured=1.15, revisits=1)
    assert found() == [empty, ("b", "makers/model", 5, 3, 1, 1.15, "measured")]
    told = {"study": "b", "tokens": 1, "draft_tokens": 1, "drafted": 1, "accepted": 1, "near_tie": False}
    for trial, plain, prompts in ((0, 1.1, "held-out"), (1, 1.05, "held-out"), (2, 9.0, "search")):
        record = MeasurementRecord(
            trial=trial, prompt="p", prompt_set=prompts, plain_seconds=plain, draft_seconds=1.0, **told
        )
        storage.records.add(record)
    assert found() == [empty, ("b", "makers/model", 5, 3, 1, 1.1, "held-out")]


def test_studies_of_other_programs_in_the_same_storage_do_not_get_in_the_way(storage):
    open_study(storage, "ours", CONTEXT)
    theirs = optuna.create_study(study_name="theirs", storage=storage, directions=["minimize", "maximize"])
    theirs.add_trial(create_trial(values=[1.0, 2.0], params={"choice": "a"}, distributions={"choice": CHOICE}))
    assert [summary.name for summary in list_studies(storage)] == ["ours", "theirs"]


def test_a_study_is_described_with_its_best_candidates_and_its_measurements(storage):
    study = open_study(storage, "s", CONTEXT)
    add_trial(study, 0.9, "a", skip_set="attn 1", draft="4 tokens", acceptance=0.5)
    about = {"skip_set": "mlp 2", "draft": "8 tokens", "acceptance": 0.7}
    add_trial(study, 1.5, "b", **about)
    add_trial(study, 1.5, "b", measured=1.2, **about, acceptance_rate=0.6, source="trial 1, to be measured")
    add_trial(study, 2.0, "c", failed=True)
    numbers = {"trial": 2, "tokens": 1, "draft_tokens": 1, "drafted": 1, "accepted": 1}
    times = {"draft_seconds": 1, "near_tie": False}
    for name in ("s", "s", "other"):
        storage.records.add(
            MeasurementRecord(**numbers, **times, study=name, prompt="p", prompt_set="search", plain_seconds=1),
        )
    for prompt, seconds in (("q", 1), ("r", 2)):
        storage.records.add(
            MeasurementRecord(
                **numbers, **times, study="s", prompt=prompt, prompt_set="held-out", plain_seconds=seconds
            )
        )
    described = describe_study(storage, "s", 1)
    assert described["study"] == "s"
    assert described["context"] == as_recorded(CONTEXT) | {"format": 5}
    assert described["trials"] == {"complete": 1, "pruned": 2, "fail": 1}
    assert (described["evaluated"], described["measured"]) == (3, 1)
    assert described["measurements"] == 4
    assert described["best"] == [
        {"number": 2, "speedup": 1.2, "basis": "measured", "predicted_speedup": 1.5, "held_out_speedup": 1.5}
        | {"given_up": False, **about, "acceptance_rate": 0.6, "source": "trial 1, to be measured"}
    ]
    best = describe_study(storage, "s", 9)["best"]
    assert [(trial["number"], trial["basis"]) for trial in best] == [(2, "measured"), (0, "predicted")]
    assert best[1]["acceptance_rate"] is None
    with pytest.raises(InvalidInputError, match="no such study"):
        describe_study(storage, "x", 1)


def test_a_name_that_is_no_text_is_refused_in_one_line(storage):
    name = "a\udce9"  # as Python reads a byte of a command line that is not UTF-8
    for call in (lambda: load_study(storage, name), lambda: open_study(storage, name, CONTEXT)):
        with pytest.raises(InvalidInputError, match="character 2 is not valid UTF-8") as error:
            call()
        str(error.value).encode()
