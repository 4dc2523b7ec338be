"""The state of the client library, which is one global object a process.

Everything that touches it is here: initialising it once, sharing it with a session
that the user initialised, keeping it safe after a fork, and putting deadlines on it.
"""

import http.client
import io
import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import ee
import ee.deprecation
import google.auth.credentials
import requests
from ee import _state
from google.oauth2 import service_account
from googleapiclient.errors import InvalidJsonError, UnknownApiNameOrVersion

from dynamicvis_geo.earthengine.failures import classify, unknown_host
from dynamicvis_geo.errors import AuthenticationError, EarthEngineError, SessionError

if TYPE_CHECKING:
    from dynamicvis_geo.earthengine.client import EarthEngineClient

#: Connections kept open a process; requests beyond it would reconnect each time.
POOL_SIZE = 128

#: Bytes of an answer that are read at a time.
READ_BYTES = 2**20

# The library for authentication has no types.
_FROM_KEY_FILE: Any = service_account.Credentials.from_service_account_file
_ANONYMOUS: Any = google.auth.credentials.AnonymousCredentials

_attempt = threading.local()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Bound the time of all that this thread asks of the server inside.

    Args:
        seconds: In all.
    """
    _attempt.until = time.monotonic() + seconds
    try:
        yield
    finally:
        del _attempt.until


class _Answer(requests.Response):
    """An answer that is read in large pieces.

    Of an image of 512 pixels a side, pieces of 10 kB take 3 of 12 ms of processor time.
    """

    def iter_content(
        self, chunk_size: int | None = 1, decode_unicode: bool = False
    ) -> Iterator[Any]:
        """Read more at a time than the library asks for."""
        pieces: Iterator[Any] = super().iter_content(READ_BYTES, decode_unicode)
        return pieces


class _Pieces(io.RawIOBase):
    """Bytes from a socket, with the rest of the time as the limit of each piece.

    The socket's own limit is one for each wait: a byte a second would never reach it.
    """

    def __init__(self, pieces: Any, source: socket.socket, until: float) -> None:
        self._pieces, self._source, self._until = pieces, source, until

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._source.settimeout(max(0.001, self._until - time.monotonic()))
        count: int | None = self._pieces.readinto(buffer)
        return count

    def close(self) -> None:
        self._pieces.close()
        super().close()


class _TimelyResponse(http.client.HTTPResponse):
    """An answer, head and body, that keeps to the time limit of its thread."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        until = getattr(_attempt, 'until', None)
        if until is not None:
            self.fp = io.BufferedReader(_Pieces(self.fp.detach(), sock, until))


@lru_cache
def _timely(connection: Any) -> Any:
    """The kind of connection whose answers keep to the time limit."""
    return type(connection.__name__, (connection,), {'response_class': _TimelyResponse})


class _Adapter(requests.adapters.HTTPAdapter):
    """Connections of one process, with a deadline on requests that have none.

    The client library's own deadline fetches its interface description anew, and also
    holds for what the user does with the library; this one does neither.
    """

    def __init__(self) -> None:
        super().__init__(pool_maxsize=POOL_SIZE)

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        if pool.ConnectionCls.response_class is not _TimelyResponse:
            pool.ConnectionCls = _timely(pool.ConnectionCls)
        return pool

    def send(self, *args: Any, **kwargs: Any) -> requests.Response:
        until = getattr(_attempt, 'until', None)
        if until is None:
            return super().send(*args, **kwargs)
        kwargs['timeout'] = max(0.001, until - time.monotonic())
        answer = super().send(*args, **kwargs)
        answer.__class__ = _Answer
        return answer


@dataclass
class _Owned:
    """The session that this module initialised, to tell it from one of the user's."""

    state: Any
    wanted: tuple[Any, ...]
    url: str
    project: str


class _Process:
    """State that must not outlive a fork: locks, counts, mounted connections."""

    def __init__(self) -> None:
        self.idle = threading.Condition(threading.RLock())
        self.in_flight = 0
        self.mounted: requests.Session | None = None


_process = _Process()
_owned: _Owned | None = None
_users_retries: int | None = None


def _after_fork() -> None:
    """Start afresh in a child: its parent's threads may have held the locks."""
    global _process, _users_retries
    _process = _Process()
    if _users_retries is not None:
        ee.data.setMaxRetries(_users_retries)
        _users_retries = None


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def session(client: 'EarthEngineClient') -> Iterator[None]:
    """Have Earth Engine ready for *client*, and retries left to the caller.

    Args:
        client: Server, project and credentials.

    Raises:
        AuthenticationError: If the key file cannot be used.
        SessionError: If the user initialised Earth Engine for another server.
    """
    global _users_retries
    process = _process
    with process.idle:
        _prepare(process, client)
        if process.in_flight == 0:
            _users_retries = _state.get_state().max_retries
            ee.data.setMaxRetries(0)
        process.in_flight += 1
    try:
        yield
    finally:
        with process.idle:
            process.in_flight -= 1
            if process.in_flight == 0 and _users_retries is not None:
                ee.data.setMaxRetries(_users_retries)
                _users_retries = None
                process.idle.notify_all()


def _prepare(process: _Process, client: 'EarthEngineClient') -> None:
    state = _state.get_state()
    if not state.initialized or (_is_owned(state) and not _serves(client)):
        # Another session may still be at work; there is room for one only.
        process.idle.wait_for(lambda: process.in_flight == 0)
        _initialize(process, client)
    elif not _is_owned(state):
        _check_users_session(state, client)
    if process.mounted is not state.requests_session:
        # Sockets of a parent process must not be used by its child: both would read
        # each other's answers.
        _mount(process, _state.get_state().requests_session)


def _is_owned(state: Any) -> bool:
    return (
        _owned is not None
        and _owned.state is state
        and _owned.url == state.cloud_api_base_url
        and _owned.project == state.cloud_api_user_project
    )


def _wanted(client: 'EarthEngineClient') -> tuple[Any, ...]:
    return (client.project, client.url, client.credentials)


def _serves(client: 'EarthEngineClient') -> bool:
    return _owned is not None and _owned.wanted == _wanted(client)


def _mount(process: _Process, session: requests.Session | None) -> None:
    process.mounted = session
    if session is not None:
        session.mount('https://', _Adapter())
        session.mount('http://', _Adapter())


def _initialize(process: _Process, client: 'EarthEngineClient') -> None:
    from torch.utils.data import get_worker_info

    global _owned
    ee.Reset()
    _owned = None
    state = _state.get_state()
    state.requests_session = requests.Session()
    _mount(process, state.requests_session)
    ee.data.setMaxRetries(0)
    if client.is_local or get_worker_info() is not None:
        # A filled list keeps the library from fetching its list of deprecated
        # collections from elsewhere, which has no deadline; the main process warns.
        nothing = ee.deprecation.DeprecatedAsset('', None, None, None)
        ee.deprecation.deprecated_assets = {'': nothing}
    url = client.url or ee.data.HIGH_VOLUME_API_BASE_URL
    try:
        ee.Initialize(
            credentials=_credentials(client), project=_project(client), url=url
        )
    except BaseException as error:
        # The library would call itself initialised.
        ee.Reset()
        if _is_elsewhere(error):
            raise EarthEngineError(
                f'url={url!r} answers, but not as Earth Engine does: correct it, '
                'or leave it out; or sign in to the network of this machine.'
            ) from error
        if client.url is not None and unknown_host(error):
            # Waiting helps against a lost network, not against a wrong name.
            raise EarthEngineError(
                f'url={client.url!r}: there is no server of this name, or '
                'no network; correct it, or leave it out.'
            ) from error
        raise
    state = _state.get_state()
    state.max_retries = type(state)().max_retries
    _owned = _Owned(
        state,
        _wanted(client),
        str(state.cloud_api_base_url),
        str(state.cloud_api_user_project),
    )


def _is_elsewhere(error: BaseException) -> bool:
    """Say if an answer to initialising is of another server than Earth Engine."""
    if isinstance(error, UnknownApiNameOrVersion | InvalidJsonError):
        return True
    failure = classify(error)
    return (
        failure is not None
        and failure.error is EarthEngineError
        and failure.status is not None
    )


def _credentials(client: 'EarthEngineClient') -> Any:
    given = client.credentials
    if isinstance(given, str | Path):
        try:
            return _FROM_KEY_FILE(str(given), scopes=ee.oauth.SCOPES)
        except (OSError, ValueError, json.JSONDecodeError) as error:
            raise AuthenticationError(
                f'credentials={str(given)!r} is not the key of a service account '
                f'({error}); download its JSON key from the Google Cloud console.'
            ) from error
    if given is not None:
        return given
    if client.is_local:
        return _ANONYMOUS()
    try:
        return ee.data.get_persistent_credentials()
    except ee.EEException as error:
        missing = error
    if client.url is not None:
        # A mistake in the address is told before what it would take to use it.
        requests_session = _state.get_state().requests_session
        if requests_session is not None:
            requests_session.head(client.url)
    raise missing


def _project(client: 'EarthEngineClient') -> str | None:
    project = (
        client.project
        or os.environ.get('EARTHENGINE_PROJECT')
        or os.environ.get('GOOGLE_CLOUD_PROJECT')
    )
    return project or ('local-project' if client.is_local else None)


def _check_users_session(state: Any, client: 'EarthEngineClient') -> None:
    if client.url is not None and client.url != state.cloud_api_base_url.rstrip('/'):
        raise SessionError(
            f'Earth Engine is initialised for {state.cloud_api_base_url} in this '
            f'process, so url={client.url!r} cannot be used: call ee.Reset() first, or '
            'leave url out.'
        )
    project = state.cloud_api_user_project
    if client.project is not None and client.project != project:
        warnings.warn(
            f'Earth Engine was initialised with project {project!r} in this process; '
            f'project={client.project!r} is not used.',
            stacklevel=2,
        )


def users_session() -> dict[str, Any]:
    """Project, URL and credentials of a session that the user initialised, if any.

    A spawned worker has none of it, and is to do as its parent does.
    """
    state = _state.get_state()
    if not state.initialized or _is_owned(state):
        return {}
    return {
        'project': state.cloud_api_user_project,
        'url': state.cloud_api_base_url,
        'credentials': state.credentials,
    }


def is_loopback(url: str | None) -> bool:
    """Tell if a URL stays on this machine.

    Args:
        url: The URL; None is Earth Engine's own.
    """
    host = urlsplit(url or '').hostname or ''
    return host in ('localhost', '::1') or host.startswith('127.')
