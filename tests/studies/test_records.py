"""What is kept beside Optuna's tables."""

from datetime import UTC, datetime

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import inspect

from studies.records import MeasurementRecord, Table
from studies.storage import open_storage

WHOLE = st.integers(0, 2**31 - 1)
SECONDS = st.floats(1e-6, 1e6)
VALUES = st.fixed_dictionaries(
    {
        "study": st.sampled_from(["a", "b", "ä·b"]),
        "trial": WHOLE,
        "prompt": st.text("0123456789abcdef", min_size=1, max_size=64),
        "prompt_set": st.sampled_from(["search", "held-out"]),
        "plain_seconds": SECONDS,
        "draft_seconds": SECONDS,
        "tokens": WHOLE,
        "draft_tokens": WHOLE,
        "drafted": WHOLE,
        "accepted": WHOLE,
        "near_tie": st.booleans(),
    }
)


def values_of(record):
    return {name: getattr(record, name) for name in MeasurementRecord.__table__.columns.keys()}  # noqa: SIM118


@given(st.lists(VALUES, max_size=6))
@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_recorded_is_read_back_by_study_in_order(tmp_path_factory, rows):
    url = f"sqlite:///{tmp_path_factory.mktemp('records')}/studies.db"
    storage = open_storage(url)
    for row in rows:
        storage.records.add(MeasurementRecord(**row))
    storage = open_storage(url)  # as another process would
    for study in ("a", "b", "ä·b", "none"):
        read = [values_of(record) for record in storage.records.of(study)]
        expected = [row for row in rows if row["study"] == study]
        assert [{name: record[name] for name in row} for record, row in zip(read, expected, strict=True)] == expected


def test_a_record_has_its_time(storage):
    earliest = datetime.now(UTC).replace(tzinfo=None)
    row = dict.fromkeys(["plain_seconds", "draft_seconds"], 1.0) | dict.fromkeys(
        ["trial", "tokens", "draft_tokens", "drafted", "accepted"], 1
    )
    storage.records.add(MeasurementRecord(**row, study="s", prompt="p", prompt_set="search", near_tie=False))
    [record] = storage.records.of("s")
    # SQLite keeps no time zone; what is kept is UTC.
    assert earliest <= record.measured_at.replace(tzinfo=None) <= datetime.now(UTC).replace(tzinfo=None)


def test_the_table_lies_beside_optunas_own_and_making_it_twice_is_harmless(storage):
    Table.metadata.create_all(storage.engine)
    tables = set(inspect(storage.engine).get_table_names())
    assert {"layerskip_prompt_measurements", "trials", "studies"} <= tables
