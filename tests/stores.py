"""Stores and web servers on 127.0.0.1 that tests read from and write to.

They are processes of their own: GDAL may wait for an answer while no other thread of
its process can run.
"""

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest
from s3fs import S3FileSystem
from upath import UPath

from dynamicvis_geo.store import Store

Upload = Callable[..., UPath]

_S3 = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer('127.0.0.1', 0, verbose=False)
server.start()
print('http://%s:%s' % server.get_host_and_port(), flush=True)
sys.stdin.read()
"""


@contextmanager
def _served(*arguments: str | Path) -> Iterator[str]:
    """Run a server, which prints its address and ends with its standard input."""
    with subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()


@pytest.fixture(scope='session')
def s3_server() -> Iterator[str]:
    """An S3 server; gives its address."""
    with _served('-c', _S3) as address:
        yield address


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket, for which the environment is set; gives its URL."""
    for name in [name for name in os.environ if name.startswith('AWS_')]:
        monkeypatch.delenv(name)
    monkeypatch.setenv('AWS_ENDPOINT_URL', s3_server)
    monkeypatch.setenv('AWS_ACCESS_KEY_ID', 'key')
    monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', 'secret')
    monkeypatch.setenv('AWS_DEFAULT_REGION', 'us-east-1')
    S3FileSystem.clear_instance_cache()
    # A name of its own: GDAL remembers what lay where.
    name = f'bucket-{uuid.uuid4().hex}'
    fsspec.filesystem('s3').mkdir(name)
    yield f's3://{name}'
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def upload(bucket: str) -> Upload:
    """Copy a file or a folder into the bucket; gives its URL."""

    def put(path: Path, name: str | None = None) -> UPath:
        url = f'{bucket}/{name or path.name}'
        fsspec.filesystem('s3').put(str(path), url, recursive=path.is_dir())
        return UPath(url)

    return put


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """Serve the files of the test's folder; gives the address."""
    with _served(Path(__file__).with_name('web_server.py'), tmp_path) as address:
        yield address


@pytest.fixture(params=['folder', 'memory'])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == 'folder':
        yield Store(str(tmp_path / 'a::b' / 'out.partial'))
        return
    url = f'memory://{uuid.uuid4().hex}/out.partial'
    yield Store(url)
    fsspec.filesystem('memory').rm(url.rsplit('/', 1)[0], recursive=True)
