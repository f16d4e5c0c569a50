"""``layerskip studies serve``: a server between a database and many workers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

from optuna.storages import get_storage

from layerskip.errors import InvalidInputError, LayerSkipError
from studies import rpc
from studies.database import DatabaseStorage
from studies.retry import retry_until

_THREADS = 10  # as many as Optuna's own; each holds a connection to the database while it works
_SECONDS_TO_FINISH = 2.0


def serve(storage: DatabaseStorage, *, host: str, port: int, when_ready: Callable[[str], None]) -> None:
    """Serve a database's studies to workers until interrupted.

    Args:
        storage: What to serve.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        when_ready: Called with the storage URL for workers as soon as it can be opened.

    Raises:
        MissingDependencyError: The ``grpc`` extra is not installed.
        InvalidInputError: The address or port cannot be listened on.
    """
    rpc.need_grpc()
    ended = Event()
    server = _server(storage, ended)
    try:
        bound = server.add_insecure_port(rpc.address(host, port))
    except RuntimeError as error:
        raise _cannot_listen(host, port) from error
    if not bound:
        raise _cannot_listen(host, port)
    server.start()
    try:
        when_ready(f"grpc://{rpc.address(host, bound)}")
        server.wait_for_termination()
    finally:
        try:
            server.stop(grace=_SECONDS_TO_FINISH).wait()  # cancels what still waits; the workers ask again
        finally:
            ended.set()


def _cannot_listen(host: str, port: int) -> InvalidInputError:
    return InvalidInputError(
        f"cannot listen on {host}, port {port}: the address is taken or not this machine's; "
        "choose another with --host and --port"
    )


def _server(storage: DatabaseStorage, ended: Event) -> Any:
    import grpc
    from optuna.storages._grpc.auto_generated import api_pb2_grpc
    from optuna.storages._grpc.servicer import OptunaStorageProxyService

    server = grpc.server(
        ThreadPoolExecutor(max_workers=_THREADS),
        interceptors=[_errors_in_one_line(ended)],
        options=[("grpc.so_reuseport", 0)],  # or two servers could share a port, each with a half of the calls
    )
    cached = get_storage(storage)
    for study in cached.get_all_studies():  # the cache finds a trial's study for those only that it has seen
        cached.get_all_trials(study._study_id, deepcopy=False)
    add_service: Any = api_pb2_grpc.add_StorageServiceServicer_to_server
    add_service(OptunaStorageProxyService(cached), server)
    server.add_generic_rpc_handlers((_methods(storage),))
    return server


def _methods(storage: DatabaseStorage) -> Any:
    import grpc

    records = storage.records
    methods: dict[str, Callable[[Any], Any]] = {
        rpc.GREET: lambda _: {"heartbeat_seconds": storage.get_heartbeat_interval()},
        rpc.HEARTBEAT: storage.record_heartbeat,
        rpc.SILENT_TRIALS: storage.silent_trial_ids,
        rpc.ADD_RECORD: lambda told: records.add(rpc.record_from_json(told[0]), repeated=told[1]),
        rpc.RECORDS: lambda study: [rpc.record_to_json(record) for record in records.of(study)],
    }
    handlers = {name: _handler(answer) for name, answer in methods.items()}
    return grpc.method_handlers_generic_handler(rpc.SERVICE, handlers)


def _handler(answer: Callable[[Any], Any]) -> Any:
    import grpc

    return grpc.unary_unary_rpc_method_handler(
        lambda arguments, _: answer(*arguments), request_deserializer=rpc.decode, response_serializer=rpc.encode
    )


def _errors_in_one_line(ended: Event) -> Any:
    """An interceptor that passes our own errors on to the worker, instead of a traceback to the server's terminal.

    What waits for the database when the server has ended gives up: Python does not end before its threads do.
    """
    import grpc

    class Interceptor(grpc.ServerInterceptor):  # type: ignore[misc]
        def intercept_service(self, continuation: Any, details: Any) -> Any:
            handler = continuation(details)
            if handler is None:
                return None
            return grpc.unary_unary_rpc_method_handler(
                _answering_errors(handler.unary_unary, ended), handler.request_deserializer, handler.response_serializer
            )

    return Interceptor()


def _answering_errors(answer: Callable[[Any, Any], Any], ended: Event) -> Callable[[Any, Any], Any]:
    import grpc

    def answer_or_abort(request: Any, context: Any) -> Any:
        try:
            with retry_until(ended):
                return answer(request, context)
        except LayerSkipError as error:
            context.abort(grpc.StatusCode.INTERNAL, str(error))

    return answer_or_abort
