"""What a served storage answers beside Optuna's own protocol, as gRPC methods that take and return JSON.

Optuna's proxy passes on neither heartbeats nor tables of ours.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from layerskip.errors import MissingDependencyError
from studies.records import MeasurementRecord, values_of

SERVICE = "layerskip.Studies"
GREET, HEARTBEAT, SILENT_TRIALS = "Greet", "RecordHeartbeat", "SilentTrials"
ADD_RECORD, RECORDS = "AddRecord", "Records"


def need_grpc() -> None:
    """Say so if gRPC is not installed.

    Raises:
        MissingDependencyError: The ``grpc`` extra is not installed.
    """
    try:
        import google.protobuf  # noqa: F401
        import grpc  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "a served storage needs the packages 'grpcio' and 'protobuf'; pip install 'layerskip[grpc]'"
        ) from error


def encode(value: Any) -> bytes:
    """A JSON value for the wire."""
    return json.dumps([value]).encode()


def decode(content: bytes) -> list[Any]:
    """A JSON value from the wire, in a list: gRPC takes None for a failure to decode."""
    values: list[Any] = json.loads(content)
    return values


def address(host: str, port: int) -> str:
    """A host and a port as gRPC wants them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def record_to_json(record: MeasurementRecord) -> dict[str, Any]:
    """A measurement as plain values."""
    return {
        name: value.isoformat() if isinstance(value, datetime) else value for name, value in values_of(record).items()
    }


def record_from_json(values: dict[str, Any]) -> MeasurementRecord:
    """The measurement of :func:`record_to_json`."""
    when = {"measured_at": datetime.fromisoformat(values["measured_at"])} if "measured_at" in values else {}
    return MeasurementRecord(**values | when)
