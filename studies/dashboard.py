"""The Optuna dashboard on a storage, with figures, notes and draft profiles attached to our studies."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna
import plotly.graph_objects as go
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.exceptions import ExperimentalWarning

from layerskip.errors import InvalidInputError, MissingDependencyError
from layerskip.profile import PROFILE_NAME, DraftProfile
from studies.figures import Picture, study_figures
from studies.report import facts, verdict
from studies.storage import ReconnectingStorage
from studies.study import load_study, our_studies
from studies.view import StudyView, view_study

# Attributes of a study: digests of the attached figures and note, and ids of artifacts by the digest of their content.
_ATTACHED_KEY = "layerskip:attached"
_ARTIFACTS_KEY = "layerskip:artifacts"
_NOTE, _OBJECTIVES = "note", "objectives"
_OBJECTIVE = "speedup"
_MOST_CANDIDATES = 5  # as many as fit into the dashboard's boxes
_TITLE_PIXELS = 44
_LEGEND_PIXELS = 44  # of two rows


def attach_figures(storage: ReconnectingStorage, name: str) -> None:
    """Attach a study's figures and a note, as far as they changed, and name its objective once.

    A note that somebody edited is not overwritten.

    Args:
        storage: Where the study lives.
        name: Its name.

    Raises:
        InvalidInputError: There is no such study, or this version of layerskip did not create it.
    """
    from optuna_dashboard import get_note, save_note, save_plotly_graph_object

    study, view = load_study(storage, name), view_study(storage, name)
    pictures = study_figures(view, _MOST_CANDIDATES)
    before = _attribute(storage, study, _ATTACHED_KEY)
    attached = dict(before)
    for picture in pictures:
        if picture.figure is not None:
            figure = _titled(picture.figure, picture.title)
            attached[picture.id] = _digest(figure.to_json().encode())
            if attached[picture.id] != before.get(picture.id):
                save_plotly_graph_object(study, figure, graph_object_id=picture.id)
    if _OBJECTIVES not in before:
        _name_objective(study)
        attached[_OBJECTIVES] = _OBJECTIVE
    note, current = _note(view, pictures), get_note(study)
    if current != note and (not current or _digest(current.encode()) == before.get(_NOTE)):
        save_note(study, note)
        attached[_NOTE] = _digest(note.encode())
    if attached != before:
        _set_attribute(storage, study, _ATTACHED_KEY, attached)


def _name_objective(study: optuna.Study) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.set_metric_names([_OBJECTIVE])


def artifact_store(folder: Path) -> FileSystemArtifactStore:
    """A folder for artifacts, created if it does not exist.

    Raises:
        InvalidInputError: It cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(f"--artifacts {folder}: cannot create the folder: {error.strerror}") from error
    return FileSystemArtifactStore(str(folder))


def attach_profile(storage: ReconnectingStorage, path: Path, store: FileSystemArtifactStore) -> None:
    """Attach a draft profile, and the tensors beside it, to the study that it comes from, once.

    Args:
        storage: Where the study lives.
        path: The profile, or a folder that holds a ``draft_profile.json``.
        store: Where copies are stored.

    Raises:
        InvalidProfileError: It is not a valid profile.
        InvalidInputError: It comes from no study of this storage, or cannot be copied.
    """
    if path.is_dir():
        path /= PROFILE_NAME
    profile = DraftProfile.load(path)
    if profile.provenance.study is None:
        raise InvalidInputError(
            f"{path}: the profile was {profile.provenance.origin}; only profiles of a study can be attached to it"
        )
    study = load_study(storage, profile.provenance.study)
    before = _attribute(storage, study, _ARTIFACTS_KEY)
    attached = dict(before)
    for file in [path, *([path.with_name(profile.tensors.file)] if profile.tensors else [])]:
        digest = _digest(file.read_bytes())
        if digest in attached and _has(store, attached[digest]):
            continue
        try:
            attached[digest] = upload_artifact(
                artifact_store=store, file_path=str(file), study_or_trial=study, storage=storage
            )
        except OSError as error:
            raise InvalidInputError(f"{file}: cannot be copied to the artifacts: {error.strerror}") from error
    if attached != before:
        _set_attribute(storage, study, _ARTIFACTS_KEY, attached)


def _has(store: FileSystemArtifactStore, artifact: str) -> bool:
    try:
        store.open_reader(artifact).close()
    except ArtifactNotFound:
        return False
    return True


def _titled(figure: go.Figure, title: str) -> go.Figure:
    """A figure with its title in it, as large as the box that the dashboard has for it."""
    heading = {"text": f"<b>{title}</b>", "font": {"size": 15}, "pad": {"t": 12, "l": 12}}
    above = {"x": 0, "xanchor": "left", "y": 1, "yanchor": "top"}
    legend_above = figure.layout.showlegend is not False and figure.layout.legend.y is None
    room = _TITLE_PIXELS + _LEGEND_PIXELS * legend_above
    return go.Figure(figure).update_layout(height=None, title=heading | above, margin={"t": room})


def _note(view: StudyView, pictures: Sequence[Picture]) -> str:
    """The study's result in Markdown that holds nothing that a browser would take for HTML."""
    lines = [f"**{verdict(view)}**", "", *(f"- {name}: {escape(value, quote=False)}" for name, value in facts(view))]
    for picture in pictures:
        lines += ["", f"**{picture.title}**: {escape(picture.caption, quote=False)}"]
    return "\n".join(lines)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _attribute(storage: ReconnectingStorage, study: optuna.Study, key: str) -> Mapping[str, str]:
    attribute: dict[str, str] = storage.get_study_system_attrs(study._study_id).get(key, {})
    return attribute


def _set_attribute(storage: ReconnectingStorage, study: optuna.Study, key: str, value: dict[str, Any]) -> None:
    storage.set_study_system_attr(study._study_id, key, value)


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Leave the terminal alone."""


class _Server(ThreadingMixIn, WSGIServer):
    """Answers requests in threads of their own, so that Ctrl-C always reaches the main thread."""

    daemon_threads = True


def serve(
    storage: ReconnectingStorage,
    *,
    host: str,
    port: int,
    artifacts: Path,
    profiles: Sequence[Path] = (),
    when_ready: Callable[[str], None],
) -> None:
    """Serve the dashboard until interrupted, after attaching figures and notes to our studies where it may write.

    Args:
        storage: The storage to show.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free port.
        artifacts: Folder for copies of profiles; created if it does not exist.
        profiles: Draft profiles to attach to the studies that they come from.
        when_ready: Called with the dashboard's address as soon as it can be opened.

    Raises:
        MissingDependencyError: The ``dashboard`` extra is not installed.
        InvalidProfileError: A profile cannot be read.
        InvalidInputError: A profile comes from no study of this storage, or the address or port cannot be listened on.
    """
    try:
        from optuna_dashboard import wsgi
    except ImportError as error:
        raise MissingDependencyError(
            "the dashboard needs the package 'optuna-dashboard'; pip install 'layerskip[dashboard]'"
        ) from error
    store = artifact_store(artifacts)
    for profile in profiles:
        attach_profile(storage, profile, store)
    app = wsgi(storage, artifact_store=store)
    try:
        server = make_server(host, port, app, server_class=_Server, handler_class=_QuietHandler)
    except OSError as error:
        raise InvalidInputError(
            f"cannot listen on {host}, port {port}: {error.strerror}; choose another with --host and --port"
        ) from error
    for name in () if storage.is_read_only else our_studies(storage):
        attach_figures(storage, name)
    with server:
        when_ready(f"http://{host}:{server.server_port}/")
        server.serve_forever()
