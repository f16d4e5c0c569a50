"""A draft profile is JSON that survives the round trip, and every way to be wrong has one line that says so."""

import json
import shutil
import signal
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from layerskip import (
    ConfidenceThreshold,
    DraftConfig,
    DraftProfile,
    FixedLength,
    LayerSkipModel,
    PromptLookup,
    SkipSet,
    generate,
)
from layerskip.costs import DraftRoundCosts
from layerskip.drafting.bridges import Bridge
from layerskip.drafting.controller import ControlledDrafter
from layerskip.drafting.weights import DraftWeights
from layerskip.errors import InvalidInputError, InvalidProfileError
from layerskip.fingerprint import ModelIdentity, identify
from layerskip.profile import Measured, Provenance
from tests.layerskip.test_utils_files import files_no_larger_than
from tests.models import LAYERS, VOCABULARY, tiny_llama, transformers_greedy
from tests.processes import processes
from tests.strategies import draft_exits, precisions, skip_sets

SCHEMA = Path(__file__).parents[2] / "docs" / "draft-profile.schema.json"

IDENTITY = ModelIdentity(
    id="my-model",
    family="llama",
    num_layers=LAYERS,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    fingerprint="0123456789abcdef",
)
MEASURED = Measured(
    speedup=1.25,
    speedup_low=1.2,
    speedup_high=1.3,
    acceptance_rate=0.75,
    plain_tokens_per_second=15.0,
    speculative_tokens_per_second=18.75,
    prompts=8,
    prompt_set="held-out",
    max_new_tokens=64,
    near_ties=0,
    device="cpu",
    dtype="float32",
    versions={"torch": "2.13.0"},
)


PROVENANCE = Provenance(
    study="nightly", trial=7, created=datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC), tool="layerskip 0.1.0"
)
SKIP_SET = SkipSet(LAYERS, (1,), (2,))


def a_profile(weights=None, *, model=IDENTITY, skip_set=SKIP_SET, measured=MEASURED, provenance=PROVENANCE, **policy):
    config = DraftConfig(skip_set, **{"stopping": ConfidenceThreshold(0.5, max_length=6)} | policy)
    return DraftProfile.of(config, weights, model=model, provenance=provenance, measured=measured)


def profile_for(model, weights=None, **parts):
    return a_profile(weights, model=identify(model, "my-model"), **parts)


# The round trip.

positive = st.floats(1e-6, 1e6)


def measurements():
    return st.builds(
        Measured,
        speedup=positive,
        speedup_low=positive,
        speedup_high=positive,
        acceptance_rate=st.none() | st.floats(0, 1),
        plain_tokens_per_second=positive,
        speculative_tokens_per_second=positive,
        prompts=st.integers(1, 99),
        prompt_set=st.sampled_from(["held-out", "search"]),
        max_new_tokens=st.integers(1, 4096),
        near_ties=st.integers(0, 99),
        device=st.text(),
        dtype=st.sampled_from(["float32", "bfloat16"]),
        versions=st.dictionaries(st.text(), st.text(), max_size=3),
    )


provenances = st.builds(
    Provenance,
    study=st.none() | st.text(),
    trial=st.none() | st.integers(0, 10**6),
    created=st.datetimes(timezones=st.just(UTC)),
    tool=st.text(),
    training_seconds=st.none() | st.floats(0, 1e6),
)


drafts = st.builds(DraftConfig, skip_sets(), precision=precisions(), stopping=draft_exits())


@given(drafts, st.none() | measurements(), provenances, st.text())
@settings(max_examples=100)
def test_a_profile_survives_saving_and_loading(tmp_path_factory, config, measured, provenance, name):
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    profile = a_profile(
        model=replace(IDENTITY, id=name),
        skip_set=config.skip_set,
        precision=config.precision,
        stopping=config.stopping,
        measured=measured,
        provenance=provenance,
    )
    profile.save(path)
    loaded = DraftProfile.load(path)
    assert loaded == profile
    assert loaded.config == config
    assert type(loaded.stopping) is type(config.stopping)
    assert (loaded.measured, loaded.provenance) == (measured, provenance)


def test_profiles_that_differ_are_unequal():
    assert a_profile() == a_profile()
    assert a_profile() != a_profile(skip_set=SkipSet(LAYERS))
    assert a_profile() != a_profile(stopping=FixedLength(6))
    assert a_profile() != "a profile"


def test_a_saved_profile_is_json_that_people_can_read(tmp_path):
    a_profile().save(tmp_path / "profile.json")
    text = (tmp_path / "profile.json").read_text()
    assert text.startswith('{\n  "format": "layerskip.draft-profile",\n  "version": 4,\n')
    assert text.endswith("}\n")
    fields = json.loads(text)
    assert fields["skip_set"] == {"num_layers": LAYERS, "attention": [1], "mlp": [2]}
    assert fields["draft_exit"] == {"kind": "confidence", "threshold": 0.5, "max_length": 6}


def test_a_path_may_be_a_string(tmp_path):
    a_profile().save(str(tmp_path / "profile.json"))
    assert DraftProfile.load(str(tmp_path / "profile.json")) == a_profile()


def test_a_profile_made_by_hand_needs_only_the_model_the_skip_set_and_the_exit(tmp_path):
    fields = json.loads(a_profile().model_dump_json())
    path = tmp_path / "profile.json"
    fields["provenance"] = {"created": "2025-01-02T03:04:05Z", "tool": "by hand"}
    del fields["measured"], fields["skip_set"]["mlp"], fields["draft_exit"]["max_length"]
    path.write_text(json.dumps(fields))
    loaded = DraftProfile.load(path)
    assert loaded.skip_set == SkipSet(LAYERS, (1,))
    assert loaded.stopping == ConfidenceThreshold(0.5)


# What can be wrong with a file.


def broken(tmp_path, change):
    """A good profile's file after a change to its fields, and the error that loading it gives."""
    fields = json.loads(a_profile().model_dump_json())
    change(fields)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(InvalidProfileError) as error:
        DraftProfile.load(path)
    return str(error.value).removeprefix(f"{path}: ")


def put(*where, value):
    def change(fields):
        for key in where[:-1]:
            fields = fields[key]
        fields[where[-1]] = value

    return change


def drop(*where):
    def change(fields):
        for key in where[:-1]:
            fields = fields[key]
        del fields[where[-1]]

    return change


UNKNOWN = "unknown field; remove it, or update layerskip if a newer version wrote the file"
MISSING = "required, but missing"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("version", value=5), "version: expected 1, 2, 3 or 4, found 5"),
        (put("version", value="1"), "version: expected 1, 2, 3 or 4, found '1'"),
        (put("precision", value="int2"), "precision: expected 'full', 'int8' or 'int4', found 'int2'"),
        (put("format", value="zip"), "format: expected 'layerskip.draft-profile', found 'zip'"),
        (put("color", value=1), f"color: {UNKNOWN}"),
        (put("skip_set", "heads", value=[]), f"skip_set.heads: {UNKNOWN}"),
        (put("model", "owner", value="me"), f"model.owner: {UNKNOWN}"),
        (
            put("branches", value=[2, [1, 1]]),
            "branches: expected one number for each place, because no draft heads draft; found a list",
        ),
        (
            put("branches", value=[2, 0]),
            "branches: place 2 of the tree: expected at least 1, or a list that may hold 0 after its first number, "
            "got 0",
        ),
        (
            put("branches", value=[2, []]),
            "branches: place 2 of the tree: expected at least 1, or a list that may hold 0 after its first number, "
            "got an empty list",
        ),
        (put("branches", value=[[2, 1]]), "branches: place 1 of the tree: has 2 numbers, but follows 1 token"),
        (
            put("branches", value=[2, [1, 1, 1]]),
            "branches: place 2 of the tree: has 3 numbers, but follows 2 tokens",
        ),
        (put("measured", "luck", value=1), f"measured.luck: {UNKNOWN}"),
        (drop("model"), f"model: {MISSING}"),
        (drop("model", "fingerprint"), f"model.fingerprint: {MISSING}"),
        (drop("skip_set"), f"skip_set: {MISSING}"),
        (drop("draft_exit"), f"draft_exit: {MISSING}"),
        (drop("measured", "speedup"), f"measured.speedup: {MISSING}"),
        (
            put("skip_set", "attention", value=[4]),
            "skip_set: attention: layer 4 is out of range; the model has layers 0 to 3",
        ),
        (put("skip_set", "mlp", value=[-1]), "skip_set: mlp: layer -1 is out of range; the model has layers 0 to 3"),
        (
            put("skip_set", "mlp", value=[2, 2]),
            "skip_set: mlp: layer 2 is named twice; name each skipped layer once",
        ),
        (
            put("skip_set", value={"num_layers": LAYERS, "attention": [0, 1, 2, 3], "mlp": [3, 2, 1, 0]}),
            "skip_set: attention and mlp: all 8 sublayers are skipped; a draft must keep at least one",
        ),
        (
            put("skip_set", "num_layers", value=30),
            "skip_set.num_layers: expected 4 as in model.num_layers, found 30",
        ),
        (
            put("skip_set", "attention", value=[1.5]),
            "skip_set.attention.0: expected a valid integer, found 1.5",
        ),
        (put("skip_set", "attention", value=["1"]), "skip_set.attention.0: expected a valid integer, found '1'"),
        (put("skip_set", "attention", value=3), "skip_set.attention: expected a valid array, found 3"),
        (put("measured", "prompts", value=0), "measured.prompts: expected greater than or equal to 1, found 0"),
        (put("measured", "speedup", value=0), "measured.speedup: expected greater than 0, found 0"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected(tmp_path, change, message):
    assert broken(tmp_path, change) == message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            put("draft_exit", "threshold", value=1.5),
            ["draft_exit", "threshold: expected a number from 0 to 1, got 1.5"],
        ),
        (put("draft_exit", "max_length", value=0), ["draft_exit", "max_length: expected at least 1, got 0"]),
        (put("draft_exit", "length", value=4), ["draft_exit", "length", "unknown field"]),
        (put("draft_exit", "threshold", value="high"), ["draft_exit", "threshold", "valid number", "'high'"]),
        (
            put("draft_exit", "kind", value="lucky"),
            ["draft_exit", "kind", "'fixed', 'confidence', 'adaptive'", "'lucky'"],
        ),
        (drop("draft_exit", "kind"), ["draft_exit", "kind", "missing"]),
        (put("draft_exit", value=4), ["draft_exit", "expected", "found 4"]),
        (put("measured", "acceptance_rate", value=1.01), ["measured.acceptance_rate", "less than or equal to 1"]),
        (put("measured", "prompt_set", value="all"), ["measured.prompt_set", "'held-out' or 'search'", "'all'"]),
        (put("provenance", "created", value="yesterday"), ["provenance.created", "datetime", "'yesterday'"]),
        (put("measured", "versions", value=[]), ["measured.versions", "[]"]),
        (put("model", value="smollm2"), ["model", "smollm2"]),
        (put("model", "num_layers", value=True), ["model.num_layers", "integer", "True"]),
    ],
)
def test_a_wrong_value_is_reported_in_one_line_with_its_field(tmp_path, change, words):
    message = broken(tmp_path, change)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("field", ["speedup", "speedup_high", "plain_tokens_per_second"])
def test_an_infinite_figure_is_refused_because_json_has_none(tmp_path, field):
    assert f"measured.{field}" in broken(tmp_path, put("measured", field, value=float("inf")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not json", "not JSON: "),
        (b"", "not JSON: "),
        (b'{"format": "layerskip.draft-profile"', "not JSON: "),
        (b"\xff\xfe\x00binary", "not a text file; expected a draft profile in JSON"),
        (b"[]", "[]"),
        (b"{}", "model: required, but missing"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "profile.json"
    path.write_bytes(content)
    with pytest.raises(InvalidProfileError) as error:
        DraftProfile.load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path):
    with pytest.raises(InvalidProfileError) as error:
        DraftProfile.load(tmp_path / "missing.json")
    reason = "cannot read the draft profile: No such file or directory; 'layerskip search MODEL' makes one"
    assert str(error.value) == f"{tmp_path / 'missing.json'}: {reason}"
    with pytest.raises(InvalidProfileError, match=r"draft_profile\.json: cannot read the draft profile: No such file"):
        DraftProfile.load(tmp_path)


def test_a_misspelt_name_is_told_what_lies_beside_it_and_a_bare_one_who_knows_names(tmp_path):
    a_profile().save(tmp_path / "demo_profile.json")
    with pytest.raises(InvalidProfileError, match=r"; did you mean '.*demo_profile\.json'\?$"):
        DraftProfile.load(tmp_path / "demo_profil.json")
    for name in ("smollm2", "qwen2.5-coder-1.5b"):
        with pytest.raises(InvalidProfileError, match=r"; layerskip\.load_profile takes names of ready profiles, too$"):
            DraftProfile.load(name)


# The model that it is for.


def test_a_profile_for_this_model_gives_a_drafter_whose_output_is_the_model_s(tmp_path, tiny):
    profile_for(tiny).save(tmp_path / "profile.json")
    drafter = DraftProfile.load(tmp_path / "profile.json").drafter(tiny)
    generation = generate(tiny, [1, 2, 3], drafter=drafter, max_new_tokens=12)
    assert generation.tokens == transformers_greedy(tiny.hf_model, [1, 2, 3], 12)
    assert generation.stats.drafted > 0


def test_the_name_of_the_model_does_not_matter(llama):
    profile_for(llama).check(llama)
    a_profile(model=identify(llama, "elsewhere/copy")).check(llama)


@pytest.mark.parametrize("use", [DraftProfile.check, DraftProfile.drafter])
def test_another_model_is_refused_with_what_differs(tmp_path, llama, gemma2, use):
    path = tmp_path / "profile.json"
    profile_for(llama).save(path)
    profile = DraftProfile.load(path)
    with pytest.raises(InvalidProfileError) as error:
        use(profile, gemma2)
    assert str(error.value) == (
        f"{path}: model.family: the profile is for 'llama' (my-model), but this model has 'gemma2'; "
        "search this model for a profile of its own"
    )


@pytest.mark.parametrize("use", [DraftProfile.check, DraftProfile.drafter])
def test_a_model_that_is_not_wrapped_is_refused_with_the_way_to_wrap_it(llama, use):
    with pytest.raises(InvalidInputError) as error:
        use(profile_for(llama), llama.hf_model)
    assert str(error.value) == (
        "model: expected a LayerSkipModel, got LlamaForCausalLM; wrap it: LayerSkipModel(model)"
    )


def test_an_assistant_is_made_of_the_model_and_not_of_its_wrapper(llama):
    with pytest.raises(InvalidInputError, match=r"^model: is wrapped already; pass its hf_model$"):
        profile_for(llama).as_assistant(llama)


def test_a_profile_fits_other_weights_of_the_same_sizes_and_says_so_once(llama, caplog):
    other = LayerSkipModel(tiny_llama(seed=1))
    profile = profile_for(llama)
    for _ in range(2):
        drafter = profile.drafter(other)
    ours = generate(other, [1, 2, 3], drafter=drafter, max_new_tokens=12, eos_token_ids=()).tokens
    assert ours == generate(other, [1, 2, 3], max_new_tokens=12, eos_token_ids=()).tokens
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("draft profile: was measured on other weights of these sizes (")
    assert line.endswith("'layerskip bench' measures the speedup here")
    caplog.clear()
    profile.check(llama)
    assert not caplog.records


def test_a_profile_with_tensors_is_for_the_weights_that_they_were_fitted_to(llama):
    profile = profile_for(llama, DraftWeights(token_ids=torch.arange(8)))
    with pytest.raises(InvalidProfileError, match=r"^draft profile: model\.fingerprint: the profile is for "):
        profile.check(LayerSkipModel(tiny_llama(seed=1)))


def test_a_profile_is_for_no_other_sizes(llama):
    with pytest.raises(InvalidProfileError, match=r"^draft profile: model\.intermediate_size: the profile is for "):
        profile_for(llama).check(LayerSkipModel(tiny_llama(intermediate_size=16)))


@pytest.mark.parametrize(("speedup", "pays"), [(1.01, True), (1.0, False), (0.6, False)])
def test_a_profile_pays_when_it_was_measured_to_be_faster(speedup, pays):
    assert a_profile(measured=MEASURED.model_copy(update={"speedup": speedup})).pays is pays


def test_a_profile_that_was_never_measured_is_believed():
    assert a_profile(measured=None).pays


# Saving.


def large_profile(letter):
    """About 2 MB, so that a write takes a while."""
    return a_profile(measured=MEASURED.model_copy(update={"versions": {str(i): letter * 100 for i in range(15_000)}}))


def save_for_ever(path, files, saved):
    profiles = [DraftProfile.load(file) for file in files]
    while True:
        for profile in profiles:
            profile.save(path)
            saved.release()


@contextmanager
def saver(path, *files):
    """A process that saves some profiles in turn at one path, and a semaphore that it releases after each."""
    saved = processes.Semaphore(0)
    process = processes.Process(target=save_for_ever, args=(path, files, saved))
    process.start()
    try:
        yield saved
    finally:
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL


def test_a_process_killed_while_saving_leaves_the_old_profile_or_the_new_one(tmp_path):
    path, one, other = (tmp_path / name for name in ("profile.json", "one.json", "other.json"))
    large_profile("a").save(one)
    large_profile("b").save(other)
    with saver(path, one, other) as saved:
        for _ in range(3):
            assert saved.acquire(timeout=60)
    assert path.read_bytes() in (one.read_bytes(), other.read_bytes())
    assert DraftProfile.load(path) in (large_profile("a"), large_profile("b"))


def test_a_failing_save_leaves_the_old_profile(tmp_path):
    path = tmp_path / "profile.json"
    a_profile().save(path)
    with files_no_larger_than(100_000), pytest.raises(InvalidProfileError) as error:
        large_profile("a").save(path)
    assert str(error.value) == f"{path}: cannot write the draft profile: File too large"
    assert DraftProfile.load(path) == a_profile()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("place", "reason"), [("missing/profile.json", "No such file or directory"), ("", "Is a directory")]
)
def test_a_place_that_cannot_be_written_is_refused_by_name(tmp_path, place, reason):
    with pytest.raises(InvalidProfileError, match=f"cannot write the draft profile: {reason}"):
        a_profile().save(tmp_path / place)


# Bridges and draft vocabulary.


def some_weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = IDENTITY.hidden_size
    whole = Bridge(2, 4, (torch.randn(size, size, generator=generator),), torch.randn(size, generator=generator))
    low_rank = Bridge(5, 6, (torch.ones(2, size), torch.ones(size, 2)), torch.zeros(size))
    return DraftWeights(bridges=[whole, low_rank], token_ids=torch.tensor([0, 3, 5]))


def same_weights(profile, weights):
    return profile.tensors_bytes() == save(weights.tensors())


def test_bridges_and_vocabulary_lie_beside_the_profile_and_come_back(tmp_path):
    profile = a_profile(some_weights(), target_confidence_threshold=0.5)
    profile.save(tmp_path / "profile.json")
    loaded = DraftProfile.load(tmp_path / "profile.json")
    assert (loaded.tensors.bridges, loaded.tensors.vocabulary, loaded.target_confidence_threshold) == (2, 3, 0.5)
    assert loaded == profile
    assert same_weights(loaded, some_weights())
    assert sorted(path.name for path in tmp_path.iterdir()) == [loaded.tensors.file, "profile.json"]


@pytest.mark.slow
def test_a_profile_that_several_processes_save_at_once_always_loads_with_its_own_tensors(tmp_path):
    path, kept = tmp_path / "profile.json", tmp_path / "kept"
    kept.mkdir()
    profiles = [a_profile(some_weights(seed), target_confidence_threshold=seed / 10) for seed in range(1, 5)]
    files = [kept / f"{number}.json" for number in range(len(profiles))]
    for profile, file in zip(profiles, files, strict=True):
        profile.save(file)
    profiles[0].save(path)
    seen = set()
    with saver(path, *files[:2]) as first, saver(path, *files[2:]) as second:
        for saved in (first, second):
            assert saved.acquire(timeout=60)
        for _ in range(300):
            loaded = DraftProfile.load(path)
            [same] = [n for n, profile in enumerate(profiles) if profile == loaded]
            assert loaded.tensors_bytes() == profiles[same].tensors_bytes()
            seen.add(same)
    assert seen & {0, 1}
    assert seen & {2, 3}


def test_a_profile_without_them_has_no_file_beside_it(tmp_path):
    a_profile(DraftWeights()).save(tmp_path / "profile.json")
    assert DraftProfile.load(tmp_path / "profile.json").tensors is None
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


def test_a_new_profile_leaves_the_tensors_of_another_one_alone(tmp_path):
    first, second = (a_profile(some_weights(seed)) for seed in (0, 1))
    first.save(tmp_path / "first.json")
    second.save(tmp_path / "second.json")
    assert same_weights(DraftProfile.load(tmp_path / "first.json"), some_weights(0))


def test_overwriting_a_profile_leaves_the_tensors_that_a_copy_of_it_needs(tmp_path):
    path, backup = tmp_path / "profile.json", tmp_path / "profile.json.bak"
    a_profile(some_weights()).save(path)
    shutil.copyfile(path, backup)
    a_profile().save(path)
    assert same_weights(DraftProfile.load(backup), some_weights())


def test_a_save_that_fails_keeps_the_old_profile_s_tensors(tmp_path):
    path = tmp_path / "profile.json"
    old = a_profile(some_weights())
    old.save(path)
    with files_no_larger_than(100_000), pytest.raises(InvalidProfileError):
        large_profile("a").save(path)
    assert same_weights(DraftProfile.load(path), some_weights())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "tensors.file: cannot read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), "tensors.sha256: "),
        (lambda path: path.write_bytes(b""), "tensors.sha256: "),
    ],
    ids=["missing", "altered", "emptied"],
)
def test_a_missing_or_altered_file_is_an_error_in_one_line(tmp_path, spoil, message):
    path = tmp_path / "profile.json"
    profile = a_profile(some_weights())
    profile.save(path)
    spoil(tmp_path / profile.tensors.file)
    with pytest.raises(InvalidProfileError) as error:
        DraftProfile.load(path)
    assert str(error.value).startswith(f"{path}: {message}")
    assert profile.tensors.file in str(error.value)
    assert "\n" not in str(error.value)


def test_the_file_beside_a_profile_is_in_its_folder(tmp_path):
    tensors = {"file": "../up.safetensors", "sha256": "0" * 64, "bridges": 1, "vocabulary": 0}
    assert broken(tmp_path, put("tensors", value=tensors)).startswith("tensors.file: ")


@pytest.mark.parametrize(("version", "missing"), [(1, ["gate", "tensors", "precision"]), (2, ["precision"])])
def test_a_profile_of_an_earlier_version_still_loads(tmp_path, version, missing):
    fields = json.loads(a_profile().model_dump_json())
    fields["version"] = version
    for name in missing:
        del fields[name]
    (tmp_path / "old.json").write_text(json.dumps(fields))
    assert DraftProfile.load(tmp_path / "old.json") == a_profile()


def test_prompt_lookup_of_earlier_versions_copies_as_much_after_a_short_run(tmp_path):
    fields = json.loads(a_profile().model_dump_json())
    for ngrams, lookup in (
        ({"shortest": 2, "longest": 4, "length": 7}, PromptLookup(2, 7, per_match=7)),
        ({"shortest": 3}, PromptLookup(3, 8, per_match=8)),
    ):
        (tmp_path / "old.json").write_text(json.dumps(fields | {"version": 3, "ngrams": ngrams}))
        loaded = DraftProfile.load(tmp_path / "old.json")
        assert loaded.prompt_lookup == lookup
        loaded.save(tmp_path / "new.json")
        assert DraftProfile.load(tmp_path / "new.json") == loaded


@pytest.mark.parametrize(
    ("version", "ngrams", "message"),
    [
        (4, {"longest": 4}, "ngrams.longest: unknown field"),
        (3, {"longest": 4, "deepest": 1}, "ngrams.deepest: unknown field"),
        (3, {"length": True}, "ngrams.length: "),
    ],
)
def test_prompt_lookup_that_no_version_has_is_refused(tmp_path, version, ngrams, message):
    fields = json.loads(a_profile().model_dump_json()) | {"version": version, "ngrams": ngrams}
    (tmp_path / "wrong.json").write_text(json.dumps(fields))
    with pytest.raises(InvalidProfileError) as error:
        DraftProfile.load(tmp_path / "wrong.json")
    assert str(error.value).startswith(f"{tmp_path / 'wrong.json'}: {message}")


def test_a_profile_with_costs_drafts_under_a_controller(tmp_path, llama):
    pairs = ((0, 0), (0.01, 0.01))
    costs = DraftRoundCosts("cpu", "float32", "eager", (64, 512), pairs, pairs, (1, 2), ((0.02, 0.03), (0.02, 0.04)))
    profile = profile_for(llama).model_copy(update={"costs": costs})
    profile.save(tmp_path / "profile.json")
    loaded = DraftProfile.load(tmp_path / "profile.json")
    assert loaded.costs == costs
    assert isinstance(loaded.drafter(llama), ControlledDrafter)
    assert not isinstance(profile_for(llama).drafter(llama), ControlledDrafter)


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ([3, VOCABULARY], f"corpus: token id {VOCABULARY} is outside the vocabulary, 0 to {VOCABULARY - 1}"),
        ("a text", "corpus: expected a row of token ids, got 'a text'"),
        ([[1, 2]], "corpus: expected a row of token ids, got [[1, 2]]"),
    ],
)
def test_a_corpus_that_is_no_row_of_token_ids_is_refused(llama, corpus, message):
    with pytest.raises(InvalidInputError) as error:
        profile_for(llama).drafter(llama, corpus=corpus)
    assert str(error.value) == message
    assert profile_for(llama).drafter(llama, corpus=torch.tensor([3, 4]))


def test_a_profile_drafts_at_its_precision(llama):
    for precision in ("int8", "int4"):
        profile = profile_for(llama, skip_set=SkipSet(LAYERS), precision=precision)
        assert precision in profile.draft
        ours = generate(llama, [1, 2, 3], drafter=profile.drafter(llama), max_new_tokens=24)
        assert ours.tokens == transformers_greedy(llama.hf_model, [1, 2, 3], 24)
        assert ours.stats.rounds < 24
    assert "full" not in profile_for(llama).draft


def test_a_precision_that_cannot_run_here_is_said_in_one_line(tmp_path):
    hf_model = tiny_llama()
    profile_for(LayerSkipModel(hf_model), precision="int4").save(tmp_path / "profile.json")
    hf_model.model.layers[0].mlp.forward = lambda x: x
    with pytest.raises(InvalidProfileError) as error:
        DraftProfile.load(tmp_path / "profile.json").drafter(LayerSkipModel(hf_model))
    assert str(error.value).startswith(f"{tmp_path / 'profile.json'}: precision int4: a LlamaMLP runs something else")
    assert "\n" not in str(error.value)


def test_the_working_folder_is_no_place_for_a_profile():
    with pytest.raises(InvalidProfileError, match=r"^\.: cannot write the draft profile"):
        a_profile().save(".")


# The published schema.

REGENERATE = (
    "import json, pathlib, layerskip; "
    "pathlib.Path('docs/draft-profile.schema.json')"
    ".write_text(json.dumps(layerskip.DraftProfile.model_json_schema(), indent=2) + '\\n')"
)


def test_the_published_schema_is_that_of_the_profile():
    expected = json.dumps(DraftProfile.model_json_schema(), indent=2) + "\n"
    assert SCHEMA.is_file(), f'write it: python -c "{REGENERATE}"'
    assert SCHEMA.read_text(encoding="utf-8") == expected, f'regenerate it: python -c "{REGENERATE}"'
