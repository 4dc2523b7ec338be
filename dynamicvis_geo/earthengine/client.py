"""The client of Google Earth Engine: its address, account and limits."""

import pickle
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import ee
import numpy as np

from dynamicvis_geo.earthengine.failures import REMEDIES, Failure, classify
from dynamicvis_geo.earthengine.session import (
    is_loopback,
    session,
    time_limit,
    users_session,
)
from dynamicvis_geo.earthengine.web import LEAST_TIME, Client
from dynamicvis_geo.errors import (
    ComputationError,
    EarthEngineError,
    SpecError,
    UnavailableError,
)
from dynamicvis_geo.grid import Grid

#: Share of the time for all tries that is spent to tell a server that is away from one
#: that fails on one request.
PROBE_SHARE = 0.05


@dataclass(frozen=True)
class EarthEngineClient(Client):
    """Address, account and limits of Earth Engine: plain values, so that it pickles.

    Earth Engine is initialised when the first pixels are needed, once a process. A
    session that the user initialised is used as it is. One process can talk to one
    server as one project at a time, which is how the client library is made.

    Args:
        project: Google Cloud project; by default that of the environment
            (``EARTHENGINE_PROJECT``, ``GOOGLE_CLOUD_PROJECT``) or of the credentials.
        url: Server; by default the high-volume endpoint.
        credentials: A google-auth object, the path of a service-account key, or None
            for the stored ones (``earthengine authenticate``, or the application-
            default ones). A server on this machine needs none.
        max_concurrency: Requests in flight for the whole job: divided by the ranks of
            a distributed run and by the workers of a DataLoader, at least 1 each. A
            project may have 40 (see "Earth Engine quotas").
        timeout: Seconds for one request.
        retry_for: Seconds for all tries of one request.

    Raises:
        SpecError: If a number is not positive, or a name or address is none.
    """

    project: str | None = None
    url: str | None = None
    credentials: Any = None
    max_concurrency: int = 32
    timeout: float = 300.0
    retry_for: float = 600.0
    server: ClassVar[str] = 'Earth Engine'

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.project is not None and not str(self.project).strip():
            raise SpecError(
                f'project={self.project!r} is empty: give the id of a Google Cloud '
                'project, or leave it out for that of the environment.'
            )
        if self.url is not None:
            if not _is_address(self.url):
                raise SpecError(
                    f'url={self.url!r} is not the address of a server: '
                    f'write it as {ee.data.HIGH_VOLUME_API_BASE_URL}, or leave it out.'
                )
            object.__setattr__(self, 'url', self.url.rstrip('/'))
        if isinstance(self.credentials, Path):
            object.__setattr__(self, 'credentials', str(self.credentials))

    def __getstate__(self) -> dict[str, Any]:
        """The values, completed by a session that the user initialised here."""
        state = dict(self.__dict__)
        for name, value in users_session().items():
            if state[name] is None and _pickles(value):
                state[name] = value
        return state

    @property
    def is_local(self) -> bool:
        """True if the server runs on this machine, so that nothing else is needed."""
        return is_loopback(self.url)

    @property
    def identity(self) -> Hashable:
        """Server, project and credentials."""
        # Credentials other than a path have no equality of their own.
        given = self.credentials
        return self.project, self.url, given if isinstance(given, str) else id(given)

    @contextmanager
    def attempt(self, seconds: float) -> Iterator[None]:
        """Have Earth Engine initialised, and bound the time of a request.

        Args:
            seconds: Time that is left for the request.

        Raises:
            AuthenticationError: If the key file cannot be used.
            SessionError: If Earth Engine is initialised for another server.
        """
        with time_limit(min(self.timeout, seconds)), session(self):
            yield

    def final_error(
        self, failure: Failure, text: str, chip: str, cancelled: threading.Event
    ) -> EarthEngineError:
        """Return the subclass of :class:`EarthEngineError` that fits, with a remedy.

        Args:
            failure: The last try.
            text: Its description.
            chip: Id of the chip.
            cancelled: Gives up when set.
        """
        kind = failure.error
        if kind is UnavailableError and failure.transient and self._answers(cancelled):
            kind = ComputationError
            text += ', though Earth Engine answers another request'
        remedy = REMEDIES.get(kind)
        return kind(
            f'{text}. {remedy}' if remedy else text,
            chip=chip,
            status=failure.status,
            server_message=failure.message,
        )

    def _answers(self, cancelled: threading.Event) -> bool:
        """Say if the server is there, so that it is this request that it fails on."""
        seconds = max(PROBE_SHARE * self.retry_for, LEAST_TIME)
        try:
            with self.traffic.limiter.slot(cancelled), self.attempt(seconds):
                body: bytes = ee.data.computePixels(_build_probe())
        except Exception as error:
            if classify(error) is None:
                raise
            return False
        return body.startswith(np.lib.format.MAGIC_PREFIX)


def _build_probe() -> dict[str, Any]:
    """The arguments of a request that any server can answer that can answer at all."""
    grid = Grid('EPSG:4326', 0.0, 0.0, width=1, height=1, xres=1.0, yres=1.0)
    return {
        'expression': ee.Image.constant(0),
        'fileFormat': 'NPY',
        'bandIds': ['constant'],
        'grid': grid.to_ee(),
    }


def _is_address(url: Any) -> bool:
    try:
        address = urlsplit(url)
        # Reading the port checks it.
        return (
            address.scheme in ('http', 'https')
            and bool(address.hostname)
            and address.port != 0
        )
    except (ValueError, TypeError, AttributeError):
        return False


def _pickles(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except (pickle.PicklingError, TypeError, AttributeError):
        return False
    return True
