"""Failed requests: an exception of a client library as a fact to act on."""

import errno
import http.client
import re
import socket
import ssl
import urllib.error
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import ee
import google.auth.exceptions
import requests
from googleapiclient.errors import HttpError

from dynamicvis_geo.errors import (
    AuthenticationError,
    ComputationError,
    EarthEngineError,
    NoImageryError,
    PermissionDeniedError,
    ProjectError,
    QuotaError,
    RequestTooLargeError,
    UnavailableError,
    causes_of,
    one_line,
)

# The words of the service, as public reports quote them; they are no documented part
# of its interface, hence generous patterns and a fallback that quotes the words.
_NO_IMAGERY = re.compile(
    r'\b(no|0|zero) bands|available bands: \[\]|collection is empty|empty collection'
    r'|no images',
    re.IGNORECASE,
)
_TOO_LARGE = re.compile(
    r'memory limit exceeded|request size|payload size|too large|too many pixels'
    r'|pixel grid dimensions|must be less than or equal to|computation timed out',
    re.IGNORECASE,
)
_PROJECT = re.compile(
    r'not registered|has not been used in project|no project|project .*(not found'
    r'|disabled|deleted)|required permission to use project|invalid project'
    r'|serviceusage',
    re.IGNORECASE,
)

_OF_NETWORK = (
    ConnectionError,
    TimeoutError,
    requests.RequestException,
    urllib.error.URLError,
    http.client.HTTPException,
)

#: Reasons for which OpenSSL gives up on what is no TLS.
_NO_TLS = ('WRONG_VERSION_NUMBER', 'HTTP_REQUEST', 'RECORD_LAYER_FAILURE')


class BrokenAnswerError(Exception):
    """An answer with status 200 that is not the pixels that were asked for."""


@dataclass(frozen=True)
class Failure:
    """One failed attempt.

    Attributes:
        message: The words of the server, or of what kept them from arriving.
        status: HTTP status, None if there was no answer.
        transient: Whether the same request may well succeed later.
        retry_after: Seconds that the server asks to wait.
        error: The exception to raise if it is final.
    """

    message: str
    status: int | None
    transient: bool
    retry_after: float
    error: type[EarthEngineError]

    @property
    def quota(self) -> bool:
        """True if too much was asked at a time, or altogether."""
        return self.status == 429


def classify(error: BaseException) -> Failure | None:
    """Describe an exception of a request.

    Args:
        error: Raised by Earth Engine's library, by ``requests`` or by ``urllib``.

    Returns:
        The failure; None if the exception is none of a server's or the network's.
    """
    if isinstance(error, google.auth.exceptions.GoogleAuthError):
        transient = isinstance(error, google.auth.exceptions.TransportError)
        kind = UnavailableError if transient else AuthenticationError
        status = None if transient else 401
        return Failure(_words(error), status, transient, 0.0, kind)
    answer = error if isinstance(error, HttpError) else error.__context__
    if isinstance(answer, HttpError):
        status, headers = int(answer.resp.status), answer.resp
        return _from_status(status, _words(error), _retry_after(headers))
    if isinstance(error, urllib.error.HTTPError):
        return _from_status(error.code, _words(error), _retry_after(error.headers))
    if isinstance(error, requests.HTTPError) and error.response is not None:
        status, headers = error.response.status_code, error.response.headers
        return _from_status(status, _words(error), _retry_after(headers))
    if isinstance(error, BrokenAnswerError):
        return Failure(_words(error), 200, True, 0.0, UnavailableError)
    if isinstance(error, _OF_NETWORK):
        return _of_network(error)
    if isinstance(error, ee.EEException):
        return _before_any_request(_words(error))
    return None


def _from_status(status: int, message: str, retry_after: float) -> Failure:
    transient = status == 429 or status >= 500
    kind: type[EarthEngineError] = EarthEngineError
    if status == 429:
        kind = QuotaError
    elif status >= 500:
        kind = UnavailableError
    elif status == 401:
        kind = AuthenticationError
    elif status in (400, 403, 404) and _PROJECT.search(message):
        kind = ProjectError
    elif status == 403:
        kind = PermissionDeniedError
    elif status == 400 and _NO_IMAGERY.search(message):
        kind = NoImageryError
    elif status == 413 or (status == 400 and _TOO_LARGE.search(message)):
        kind = RequestTooLargeError
    return Failure(message, status, transient, retry_after, kind)


def _of_network(error: BaseException) -> Failure:
    """Describe an error that kept a request or its answer from arriving."""
    causes = [*causes_of(error)]
    root = causes[-1]
    what = getattr(root, 'strerror', None) or _words(root)
    kind: type[EarthEngineError] = UnavailableError
    transient = True
    if isinstance(root, socket.gaierror):
        what = f'there is no address for this name ({what})'
    elif isinstance(root, ssl.SSLError):
        # A connection that breaks off is another matter than a server that is not
        # what its address says.
        transient = root.reason not in ('CERTIFICATE_VERIFY_FAILED', *_NO_TLS)
        if root.reason in _NO_TLS:
            what = 'the server does not speak https'
    elif isinstance(root, OSError) and root.errno in (errno.EMFILE, errno.ENFILE):
        what = f'{what}; raise the limit (ulimit -n) or fetch less at a time'
        kind, transient = EarthEngineError, False
    if any(isinstance(cause, requests.exceptions.ProxyError) for cause in causes):
        what = f'the proxy of the environment (HTTPS_PROXY, HTTP_PROXY): {what}'
    request = next(filter(None, (getattr(c, 'request', None) for c in causes)), None)
    where = urlsplit(getattr(request, 'url', None) or '').netloc
    return Failure(f'{where}: {what}' if where else what, None, transient, 0.0, kind)


def unknown_host(error: BaseException) -> bool:
    """Tell if a name led nowhere, for all that the network knows.

    Args:
        error: Raised by a client library.
    """
    return any(
        isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME
        for cause in causes_of(error)
    )


def _before_any_request(message: str) -> Failure:
    """A refusal of the client library itself: it lacks credentials or a project."""
    kind: type[EarthEngineError] = EarthEngineError
    if 'authorize' in message.lower() or 'authenticate' in message.lower():
        kind = AuthenticationError
    elif 'project' in message.lower():
        kind = ProjectError
    return Failure(message, None, False, 0.0, kind)


def _words(error: BaseException) -> str:
    """The message of an exception on one line, of bearable length."""
    text = one_line(error) or type(error).__name__
    return text if len(text) <= 500 else text[:500] + ' ...'


def _retry_after(headers: Mapping[str, str] | Message) -> float:
    """Seconds of a Retry-After header, which may also hold a date (RFC 9110)."""
    value = (headers.get('retry-after') or '').strip()
    if value.isdecimal():
        return float(value)
    try:
        until = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    if until.tzinfo is None:
        until = until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())


#: What to do about each kind of error.
REMEDIES: dict[type[EarthEngineError], str] = {
    AuthenticationError: (
        'Run `earthengine authenticate`, or give credentials= the path of a '
        'service-account key.'
    ),
    ProjectError: (
        'Name a Google Cloud project that is registered for Earth Engine: project=, '
        'the variable EARTHENGINE_PROJECT, or `earthengine set_project`. Projects are '
        'registered at https://code.earthengine.google.com/register.'
    ),
    PermissionDeniedError: (
        'Check that the account may use the project (role Earth Engine Resource '
        'Viewer and Service Usage Consumer) and may read the collection.'
    ),
    QuotaError: (
        'Lower max_concurrency, leave more time with retry_for, or see the quotas of '
        'the project in the Google Cloud console.'
    ),
    RequestTooLargeError: 'Ask for a shorter window, fewer bands or a coarser scale.',
    ComputationError: (
        'Ask for a shorter window or another place, or leave such chips out with '
        "on_error='skip'."
    ),
    UnavailableError: (
        'Check the network and https://status.earthengine.app, and run again: what was '
        'fetched into a cache stays there.'
    ),
}
