import http.server
import multiprocessing
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ee
import google.auth.credentials
import numpy as np
import pytest

from dynamicvis_geo.earthengine import EarthEngineClient
from dynamicvis_geo.earthengine.composite import (
    build_request,
    no_pixels,
    parse_pixels,
)
from dynamicvis_geo.errors import (
    AuthenticationError,
    ComputationError,
    EarthEngineError,
    NoImageryError,
    PermissionDeniedError,
    ProjectError,
    QuotaError,
    RequestTooLargeError,
    SpecError,
    UnavailableError,
)
from dynamicvis_geo.grid import Grid
from dynamicvis_geo.specs import SensorSpec
from tests.earthengine_server import EarthEngineServer
from tests.earthengine_server.oracle import expected
from tests.processes import HANG

pytestmark = pytest.mark.once

SENSOR = SensorSpec(cloudy_pct=90)
WINDOW = ('2022-06-01', '2022-07-21')


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('dynamicvis_geo.earthengine.web.FIRST_WAIT', 0.01)


def make_client(server: EarthEngineServer, **options: Any) -> EarthEngineClient:
    return EarthEngineClient(project='test-project', url=server.url, **options)


def tile(i: int, px: int = 16) -> tuple[slice, slice]:
    left, bottom = 590_000 + 160 * i, 5_580_000
    return slice(left, left + 10 * px, 10), slice(bottom, bottom + 10 * px, 10)


def fetch(client: EarthEngineClient, i: int = 0, sensor: SensorSpec = SENSOR) -> Any:
    grid = Grid.from_slices('EPSG:32632', *tile(i))
    return client.request(
        lambda: ee.data.computePixels(build_request(sensor, WINDOW, grid)),
        lambda body: parse_pixels(body, sensor, grid),
        chip=f'chip {i}',
        cancelled=threading.Event(),
    )


def right(pixels: Any, i: int = 0) -> bool:
    values, valid = expected(32632, *tile(i), WINDOW, SENSOR)
    assert valid.any()
    return bool((pixels == np.where(valid, values, 65535)).all())


@pytest.mark.parametrize(
    'fault', [429, 500, 502, 503, 504, 'reset', 'close', 'truncated', 'short', 'html']
)
def test_passing_faults_pass(server: EarthEngineServer, fault: int | str) -> None:
    server.set(script=[fault, fault])
    assert right(fetch(make_client(server)))
    assert server.counts()['requests'] == 3


@pytest.mark.parametrize('fault', ['hang', 'dripping head', 'dripping body'])
def test_a_request_that_never_ends_is_tried_again(
    server: EarthEngineServer, fault: str
) -> None:
    server.set(script=[fault], hang_s=HANG)
    start = time.monotonic()
    assert right(fetch(make_client(server, timeout=0.5)))
    assert time.monotonic() - start < HANG
    assert server.counts()['requests'] == 2


@pytest.mark.parametrize(
    ('status', 'message', 'error'),
    [
        (400, None, EarthEngineError),
        (400, 'User memory limit exceeded.', RequestTooLargeError),
        (
            400,
            "Pattern 'B4' was applied to an Image with no bands",
            NoImageryError,
        ),
        (401, None, AuthenticationError),
        (403, None, PermissionDeniedError),
        (403, 'Project 7 is not registered to use Earth Engine', ProjectError),
        (404, 'Project not found', ProjectError),
        (404, None, EarthEngineError),
        (408, None, EarthEngineError),
    ],
)
def test_lasting_faults_are_told_at_once(
    server: EarthEngineServer, status: int, message: str | None, error: type
) -> None:
    server.set(script=[status], message=message)
    with pytest.raises(EarthEngineError) as caught:
        fetch(make_client(server))
    assert type(caught.value) is error
    assert caught.value.status == status
    assert caught.value.chip == 'chip 0'
    if status != 401:
        assert (message or f'fail with {status}') in str(caught.value)
    assert server.counts()['requests'] == 1
    # Whatever it was, the next request goes through.
    assert right(fetch(make_client(server)))


@pytest.mark.parametrize(
    ('fault', 'error'), [(429, QuotaError), (503, UnavailableError)]
)
def test_tries_end_with_their_time(
    server: EarthEngineServer, fault: int, error: type
) -> None:
    server.set(kinds=[fault], rate=1)
    start = time.monotonic()
    with pytest.raises(error, match=r'gave up after \d+ tries') as caught:
        fetch(make_client(server, retry_for=2))
    assert time.monotonic() - start < HANG
    assert caught.value.status == fault
    assert server.counts()['requests'] > 1


@pytest.mark.parametrize('fault', ['hang', 'dripping head', 'dripping body'])
def test_requests_that_never_end_do_so_with_the_time(
    server: EarthEngineServer, fault: str
) -> None:
    server.set(kinds=[fault], rate=1, hang_s=HANG)
    start = time.monotonic()
    with pytest.raises(UnavailableError, match='timed out'):
        fetch(make_client(server, retry_for=1, timeout=HANG))
    assert time.monotonic() - start < HANG


def test_retry_after_is_honoured(server: EarthEngineServer) -> None:
    server.set(script=[503], retry_after=1)
    start = time.monotonic()
    assert right(fetch(make_client(server)))
    assert time.monotonic() - start >= 1


def test_a_wait_beyond_the_time_is_not_begun(server: EarthEngineServer) -> None:
    server.set(script=[429], retry_after=3600)
    start = time.monotonic()
    with pytest.raises(QuotaError):
        fetch(make_client(server, retry_for=5))
    # Nor does the next request wait for it.
    assert right(fetch(make_client(server, retry_for=HANG)))
    assert time.monotonic() - start < HANG


@pytest.mark.parametrize('fault', [500, 'html', 'dripping body'])
def test_a_request_that_fails_alone_is_told_from_a_server_that_is_away(
    server: EarthEngineServer, fault: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('dynamicvis_geo.earthengine.client.LEAST_TIME', 20)
    left = tile(3)[0].start
    server.set(kinds=[fault], sick=[left])
    client = make_client(server, retry_for=0.5, timeout=3)
    with pytest.raises(ComputationError, match='answers another request') as caught:
        fetch(client, 3)
    assert caught.value.status == {500: 500, 'html': 200}.get(fault)
    assert right(fetch(make_client(server), 4), 4)
    server.set(kinds=[fault], rate=1)
    with pytest.raises(UnavailableError):
        fetch(client, 3)


@pytest.mark.parametrize('scale', [1, 20])
def test_a_silence_is_told_once(
    server: EarthEngineServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    scale: int,
) -> None:
    monkeypatch.setattr('dynamicvis_geo.earthengine.web.POLL', 0.05)
    monkeypatch.setattr('dynamicvis_geo.earthengine.limiter.TELL_OF_FAILURES', 0.3)
    assert right(fetch(make_client(server)))
    client = make_client(server, retry_for=1.5)
    server.set(kinds=[503], rate=1)
    with pytest.raises(UnavailableError):
        list(client.map(lambda i, _: fetch(client, i), range(scale)))
    (told,) = caplog.messages
    time_ = r'\d\d:\d\d:\d\d'
    assert re.fullmatch(
        f'Earth Engine has not answered since {time_}, trying again: Told to fail with '
        f'503.; waiting for it until {time_}',
        told,
    )
    server.set()
    assert right(fetch(make_client(server)))
    server.set(kinds=['hang'], rate=1)
    monkeypatch.setattr('dynamicvis_geo.earthengine.limiter.TELL_OF_SILENCE', 0.5)
    with pytest.raises(UnavailableError):
        list(client.map(lambda i, _: fetch(client, i), range(scale)))
    assert re.fullmatch(f'.*since {time_}; waiting .* {time_}', caplog.messages[1])
    assert len(caplog.messages) == 2


def test_failures_that_pass_are_not_worth_a_word(
    server: EarthEngineServer, caplog: pytest.LogCaptureFixture
) -> None:
    client = make_client(server)
    server.set(kinds=[503, 'reset'], rate=0.3)
    done = client.map(lambda i, _: right(fetch(client, i), i), range(40))
    assert list(done) == [True] * 40
    assert not caplog.messages


@pytest.mark.parametrize('status', [200, 302, 404])
def test_another_server_is_told_from_earth_engine(status: int) -> None:
    page = b'<html>Welcome</html>'

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header('Content-Length', str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{other.server_port}'
        with pytest.raises(EarthEngineError, match='not as Earth Engine does') as told:
            fetch(EarthEngineClient(project='p', url=url))
        assert url in str(told.value)
        with pytest.raises(UnavailableError, match='does not speak https'):
            fetch(EarthEngineClient(project='p', url=url.replace('http', 'https')))
        other.shutdown()


@pytest.mark.parametrize(
    'url',
    [
        *('ftp://x', 'earthengine.googleapis.com', 'http://', ''),
        *('http://[::1', 'http://x:99999', 5),
    ],
)
def test_what_is_no_address_is_named(url: Any) -> None:
    with pytest.raises(SpecError, match='url=') as caught:
        EarthEngineClient(url=url)
    assert repr(url) in str(caught.value)


def test_what_keeps_from_the_server_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('NO_GCE_CHECK', 'true')
    for name in ('HTTP_PROXY', 'http_proxy', 'HTTPS_PROXY', 'https_proxy', 'NO_PROXY'):
        monkeypatch.delenv(name, raising=False)

    def words(url: str, error: type = UnavailableError) -> str:
        client = EarthEngineClient(project='p', url=url, retry_for=0.1)
        with pytest.raises(error) as caught:
            fetch(client)
        text = str(caught.value)
        assert 'authenticate' not in text
        assert '\n' not in text
        return text

    assert '127.0.0.1:9: Connection refused' in words('http://127.0.0.1:9')
    # Names that end like this never lead anywhere (RFC 2606).
    name = 'https://nowhere.invalid'
    try:
        socket.getaddrinfo('nowhere.invalid', 443)
    except socket.gaierror as error:
        if error.errno == socket.EAI_NONAME:
            assert 'there is no server of this name' in words(name, EarthEngineError)
        else:
            assert 'no address for this name' in words(name)
    monkeypatch.setenv('HTTP_PROXY', 'http://127.0.0.1:9')
    text = words('http://192.0.2.1')
    assert '192.0.2.1: the proxy' in text
    assert 'HTTP_PROXY): Connection refused' in text


def test_initialising_is_tried_again_too() -> None:
    """A server that comes up late is waited for."""
    with EarthEngineServer() as first:
        port = first.url.rsplit(':', 1)[1]
    client = EarthEngineClient(project='p', url=f'http://127.0.0.1:{port}')
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(fetch(client)))
    thread.start()
    with EarthEngineServer('--port', port):
        thread.join(HANG)
        assert right(result[0])


def test_concurrency_follows_the_server(server: EarthEngineServer) -> None:
    server.set(limit=4, latency=0.02)
    client = make_client(server, max_concurrency=16)
    fetch(client)
    server.set(limit=4, latency=0.02)
    results = dict(client.map(lambda i, _: (i, fetch(client, i)), range(80)))
    assert all(right(results[i], i) for i in range(80))
    counts = server.counts()
    assert counts['peak'] <= 16
    # The first burst is refused but for four; after it, hardly any is.
    assert counts['refused'] <= 12 + 8


def test_map_stops_at_the_first_error(server: EarthEngineServer) -> None:
    server.set(script=[None] * 5 + [403] * 500, latency=0.02)
    client = make_client(server, max_concurrency=4)
    with pytest.raises(PermissionDeniedError):
        list(client.map(lambda i, _: fetch(client, i), range(200)))
    time.sleep(0.2)
    assert server.counts()['requests'] < 40


def test_concurrency_is_for_the_whole_job(monkeypatch: pytest.MonkeyPatch) -> None:
    client = EarthEngineClient(max_concurrency=32)
    assert client.share() == 32
    monkeypatch.setenv('WORLD_SIZE', '4')
    assert client.share() == 8
    monkeypatch.setenv('WORLD_SIZE', '64')
    with pytest.warns(UserWarning, match='max_concurrency'):
        assert client.share() == 1


def in_child(client: EarthEngineClient, first: int, results: Any) -> None:
    done = client.map(lambda i, _: right(fetch(client, i), i), range(first, first + 30))
    results.put(list(done))


def test_children_of_a_process_that_made_requests(server: EarthEngineServer) -> None:
    client = make_client(server, max_concurrency=8)
    assert right(fetch(client))
    initialized = server.counts()['initialized']
    context = multiprocessing.get_context('fork')
    results = context.Queue()
    children = [
        context.Process(target=in_child, args=(client, 100 * i, results), daemon=True)
        for i in range(2)
    ]
    for child in children:
        child.start()
    # The parent goes on with its connections meanwhile.
    assert all(right(fetch(client, i), i) for i in range(20))
    for _ in children:
        assert results.get(timeout=HANG) == [True] * 30
    for child in children:
        child.join(HANG)
        assert child.exitcode == 0
    assert server.counts()['initialized'] == initialized


USERS_SESSION = """
import sys, multiprocessing, threading
import ee, google.auth.credentials
sys.path.insert(0, '.')
ee.deprecation.deprecated_assets = {'': None}
from tests.earthengine.test_client import fetch, right
from dynamicvis_geo.earthengine import EarthEngineClient

def child(client, results):
    pixels = right(fetch(client, 3), 3)
    results.put((pixels, ee.data._get_state().cloud_api_user_project))

if __name__ == '__main__':
    ee.Initialize(google.auth.credentials.AnonymousCredentials(),
                  project='mine', url=sys.argv[1])
    ee.data.setMaxRetries(3)
    client = EarthEngineClient(max_concurrency=2)
    assert right(fetch(client))
    state = ee.data._get_state()
    assert state.cloud_api_user_project == 'mine', state
    assert state.max_retries == 3, state
    for method in ('fork', 'spawn'):
        context = multiprocessing.get_context(method)
        results = context.Queue()
        process = context.Process(target=child, args=(client, results))
        process.start()
        assert results.get(timeout=600) == (True, 'mine'), method
        process.join()
    from dynamicvis_geo.errors import SessionError
    try:
        fetch(EarthEngineClient(url='http://127.0.0.1:1'))
    except SessionError:
        print('good')
"""


def test_a_session_of_the_user_is_left_alone(
    server: EarthEngineServer, tmp_path: Path
) -> None:
    script = tmp_path / 'script.py'
    script.write_text(USERS_SESSION)
    run = subprocess.run(
        [sys.executable, str(script), server.url],
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert run.stdout.strip() == 'good', run.stderr


def test_one_process_can_go_from_server_to_server(server: EarthEngineServer) -> None:
    assert right(fetch(make_client(server)))
    with EarthEngineServer() as other:
        assert right(fetch(make_client(other)))
        assert other.counts()['requests'] == 1
    assert right(fetch(make_client(server), 1), 1)


def test_clients_pickle() -> None:
    credentials = google.auth.credentials.AnonymousCredentials()
    client = EarthEngineClient('p', 'http://localhost:1/', credentials, 5, 10, 20)
    copy = pickle.loads(pickle.dumps(client))
    assert (copy.project, copy.url, copy.max_concurrency) == ('p', client.url, 5)
    assert isinstance(copy.credentials, type(credentials))


@pytest.mark.parametrize('key', ['missing.json', 'broken.json'])
def test_a_bad_key_is_named(tmp_path: Path, key: str) -> None:
    (tmp_path / 'broken.json').write_text('{"type": "service_account"}')
    path = tmp_path / key
    with pytest.raises(AuthenticationError, match=key):
        fetch(EarthEngineClient(credentials=path, project='p'))


def test_no_credentials_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('CLOUDSDK_CONFIG', str(tmp_path))
    # Where the library would ask the machine that it runs on.
    monkeypatch.setenv('NO_GCE_CHECK', 'true')
    with pytest.raises(AuthenticationError, match='earthengine authenticate'):
        fetch(EarthEngineClient())


def test_no_project_says_what_to_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ('EARTHENGINE_PROJECT', 'GOOGLE_CLOUD_PROJECT'):
        monkeypatch.delenv(name, raising=False)
    credentials = google.auth.credentials.AnonymousCredentials()
    with pytest.raises(ProjectError, match='project='):
        fetch(EarthEngineClient(credentials=credentials))


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('max_concurrency', 0),
        ('max_concurrency', 2.5),
        ('timeout', -1),
        ('retry_for', ''),
    ],
)
def test_numbers_are_checked(name: str, value: Any) -> None:
    with pytest.raises(SpecError, match=name):
        EarthEngineClient(**{name: value})


def test_pixels_that_were_not_asked_for_are_refused(
    server: EarthEngineServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another band, type or shape must not be taken for the chip."""
    monkeypatch.setattr('dynamicvis_geo.earthengine.client.LEAST_TIME', 20)
    client = make_client(server, retry_for=0.3)
    grid = Grid.from_slices('EPSG:32632', *tile(0))
    other = Grid.from_slices('EPSG:32632', *tile(0, px=17))
    bands = SensorSpec(cloudy_pct=90, bands=('B8', 'B4', 'B3'))
    floats = SensorSpec(cloudy_pct=90, dtype='float32')
    for sensor, asked in ((bands, grid), (floats, grid), (SENSOR, other)):
        with pytest.raises(ComputationError, match='instead of'):
            client.request(
                lambda sensor=sensor, asked=asked: ee.data.computePixels(
                    build_request(sensor, WINDOW, asked)
                ),
                lambda body: parse_pixels(body, SENSOR, grid),
                chip='chip',
                cancelled=threading.Event(),
            )
    assert (no_pixels(SENSOR, grid) == 65535).all()
