"""Studies behind ``layerskip studies serve``: a storage that many workers share through one server."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from optuna.exceptions import ExperimentalWarning
from optuna.storages import GrpcStorageProxy, RetryHeartbeatStaleTrialCallback
from sqlalchemy.engine import URL

from studies import rpc
from studies.reconnecting_storage import ReconnectingStorage
from studies.records import MeasurementRecord
from studies.retry import PATIENCE_SECONDS, retry_on_disconnect
from studies.storage_errors import StorageError, redacted

T = TypeVar("T")

SCHEME = "grpc"
DEFAULT_PORT = 13000
_GREETING_SECONDS = 10.0
# The server itself may be waiting for its database.
_CALL_SECONDS = PATIENCE_SECONDS + 60.0
_HEARTBEAT_SECONDS = 5.0


def open_proxy(url: URL) -> ProxyStorage:
    """The storage that is served at ``grpc://host:port``.

    Raises:
        StorageError: The URL has more in it than that, or nothing of ours answers there.
        MissingDependencyError: The ``grpc`` extra is not installed.
    """
    if not url.host or url.username or url.password or url.database or url.query:
        raise StorageError(f"storage '{redacted(url)}': expected grpc://HOST:PORT")
    rpc.need_grpc()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return ProxyStorage(url.host, url.port or DEFAULT_PORT)


class ProxyStorage(ReconnectingStorage, GrpcStorageProxy):
    """Optuna's client of a served storage, with heartbeats and measurements; waits for a server that is away."""

    def __init__(self, host: str, port: int) -> None:
        self._shown = f"{SCHEME}://{rpc.address(host, port)}"
        super().__init__(host=host, port=port)
        greeting = self._greet()
        self._heartbeat_interval: int | None = greeting["heartbeat_seconds"]
        self._stale_trial_callback = RetryHeartbeatStaleTrialCallback(max_retry=1)

    def _setup(self) -> None:
        import grpc
        from optuna.storages._grpc.auto_generated import api_pb2_grpc
        from optuna.storages._grpc.client import GrpcClientCache

        # A server that is away is waited for in persist, and not by gRPC.
        every_method = {"name": [{}], "waitForReady": False, "timeout": f"{_CALL_SECONDS:.0f}s"}
        options = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.service_config", json.dumps({"methodConfig": [every_method]})),
            ("grpc.max_reconnect_backoff_ms", 3000),
        ]
        self._channel = grpc.insecure_channel(rpc.address(self._host, self._port), options=options)
        stub: Any = api_pb2_grpc.StorageServiceStub
        self._stub = stub(self._channel)
        self._cache = GrpcClientCache(self._stub)

    @property
    def records(self) -> RemoteRecords:
        """The measurements beside the served studies."""
        return RemoteRecords(self)

    def retry_on_disconnect(self, operation: Callable[[bool], T]) -> T:
        import grpc

        try:
            return retry_on_disconnect(operation, _lost, awaited=self._shown)
        except grpc.RpcError as error:
            raise self._storage_error(error) from error

    def call(self, method: str, argument: Any = None, **options: Any) -> Any:
        """Call a method of ours once, and return its answer."""
        stub = self._channel.unary_unary(
            f"/{rpc.SERVICE}/{method}", request_serializer=rpc.encode, response_deserializer=rpc.decode
        )
        [answer] = stub(argument, **options)
        return answer

    def _greet(self) -> dict[str, Any]:
        import grpc

        try:
            answer: dict[str, Any] = self.call(rpc.GREET, wait_for_ready=False, timeout=_GREETING_SECONDS)
        except grpc.RpcError as error:
            self.close()
            raise self._storage_error(error) from error
        return answer

    def _storage_error(self, error: Any) -> StorageError:
        from grpc import StatusCode

        said = {
            StatusCode.UNAVAILABLE: "nothing answers there; start it with 'layerskip studies serve'",
            StatusCode.DEADLINE_EXCEEDED: "no answer; see what 'layerskip studies serve' says there",
            StatusCode.UNIMPLEMENTED: "another version's server, or Optuna's own; use 'layerskip studies serve'",
        }
        details = ((error.details() or "").strip().splitlines() or [error.code().name])[0]
        return StorageError(f"storage '{self._shown}': {said.get(error.code(), details)}")

    # Optuna's proxy has no heartbeat.

    def record_heartbeat(self, trial_id: int) -> None:
        """Say that a trial lives, if the server can be reached."""
        import grpc

        with contextlib.suppress(grpc.RpcError):
            self.call(rpc.HEARTBEAT, trial_id, wait_for_ready=False, timeout=_HEARTBEAT_SECONDS)

    def silent_trial_ids(self, study_id: int) -> list[int]:
        """Ids of a study's running trials that have not said for too long that they live."""
        ids: list[int] = self.retry_on_disconnect(lambda _: self.call(rpc.SILENT_TRIALS, study_id))
        return ids

    def get_heartbeat_interval(self) -> int | None:
        """Seconds between heartbeats, as the server has them."""
        return self._heartbeat_interval

    def get_heartbeat_stale_trial_callback(self) -> Callable[..., None]:
        """What queues a trial again whose worker died."""
        return self._stale_trial_callback


class RemoteRecords:
    """Measurements that the server keeps."""

    def __init__(self, storage: ProxyStorage) -> None:
        self._storage = storage

    def add(self, record: MeasurementRecord) -> None:
        """Keep one measurement."""
        values = rpc.record_to_json(record)
        self._storage.retry_on_disconnect(lambda repeated: self._storage.call(rpc.ADD_RECORD, [values, repeated]))

    def of(self, study: str) -> Sequence[MeasurementRecord]:
        """All measurements of a study, in the order in which they were made."""
        rows = self._storage.retry_on_disconnect(lambda _: self._storage.call(rpc.RECORDS, study))
        return [rpc.record_from_json(row) for row in rows]


def _lost(error: BaseException) -> bool:
    import grpc
    from grpc import StatusCode

    # A server that is being stopped cancels what it was doing; nobody else does.
    return isinstance(error, grpc.RpcError) and error.code() in (StatusCode.UNAVAILABLE, StatusCode.CANCELLED)
