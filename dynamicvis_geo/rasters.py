"""Rasters opened for reading, wherever GDAL reads from."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import rasterio
from rasterio.io import DatasetReader
from rasterio.session import DummySession
from upath import UPath

from dynamicvis_geo.errors import SourceError
from dynamicvis_geo.paths import AnyPath, is_gdal_path, is_url

T = TypeVar('T')

#: The process that is no fork of one that may have connections to servers.
_FIRST = os.getpid()

#: How GDAL names what fsspec calls by these protocols.
_SYSTEMS = {
    **dict.fromkeys(('s3', 's3a'), '/vsis3/'),
    **dict.fromkeys(('gs', 'gcs'), '/vsigs/'),
    **dict.fromkeys(('az', 'abfs'), '/vsiaz/'),
    **dict.fromkeys(('http', 'https'), '/vsicurl/'),
}

#: A server that says nothing for a minute, or is busy, is asked again, and then left.
_PATIENCE = {
    'GDAL_HTTP_CONNECTTIMEOUT': '30',
    'GDAL_HTTP_LOW_SPEED_LIMIT': '1',
    'GDAL_HTTP_LOW_SPEED_TIME': '60',
    'GDAL_HTTP_MAX_RETRY': '3',
    'GDAL_HTTP_RETRY_DELAY': '1',
}


def open_raster(path: AnyPath) -> DatasetReader:
    """Open a raster to read it.

    Args:
        path: A path, a URL, or a path of GDAL's (``/vsi...``).

    Raises:
        RasterioError: If it is not there, or no raster.
        SourceError: If GDAL does not read from such URLs.
    """
    name = gdal_name(path)
    if not is_remote(name):
        return rasterio.open(name)
    with gdal_env():
        return rasterio.open(name)


def is_remote(path: AnyPath) -> bool:
    """Tell if a raster is none of the files that the system knows.

    Args:
        path: A path, a URL, or a path of GDAL's.
    """
    return is_url(path) or is_gdal_path(path)


def gdal_name(path: AnyPath) -> str:
    """Return the name that GDAL has for a file.

    Args:
        path: A path, a URL, or a path of GDAL's.

    Raises:
        SourceError: If GDAL does not read from such URLs.
    """
    if not is_url(path):
        return str(path)
    url = UPath(path)
    if url.protocol not in _SYSTEMS:
        raise SourceError(
            f'{path}: GDAL, which reads rasters, does not read from '
            f'{url.protocol}://: copy it to a local disk, or to where s3://, gs://, '
            'az:// or https:// lead'
        )
    return _SYSTEMS[url.protocol] + url.path


def gdal_env() -> rasterio.Env:
    """Return settings for GDAL that are those of fsspec, and outlast a bad moment.

    ``AWS_ENDPOINT_URL`` names the S3 server to both; what the environment says to GDAL
    itself goes before.
    """
    options = dict(_PATIENCE)
    variables = ('AWS_ENDPOINT_URL_S3', 'AWS_ENDPOINT_URL')
    endpoint = next((os.environ[name] for name in variables if name in os.environ), '')
    if endpoint:
        scheme, _, host = endpoint.rstrip('/').rpartition('://')
        options |= {
            'AWS_S3_ENDPOINT': host,
            'AWS_HTTPS': 'NO' if scheme == 'http' else 'YES',
            'AWS_VIRTUAL_HOSTING': 'FALSE',
        }
    given = {name: value for name, value in options.items() if name not in os.environ}
    # GDAL finds credentials by itself: rasterio would look for them with boto3.
    return rasterio.Env(session=DummySession(), **given)


def apart_from_parent(read: Callable[[], T]) -> T:
    """Read from a server on no connection that another process has as well.

    A fork leaves the child the connections of the thread that forked it, and GDAL goes
    on using them there; processes that ask on one connection get the answers of each
    other, without an error. GDAL's connections are those of a thread, so a forked
    process reads in another one.

    Args:
        read: Opens a raster and reads from it; what it raises is raised.

    Returns:
        What it gives.
    """
    if os.getpid() == _FIRST:
        return read()
    return _reader(os.getpid(), threading.get_ident()).submit(read).result()


@lru_cache(maxsize=64)
def _reader(process: int, thread: int) -> ThreadPoolExecutor:
    """Make the thread in which a thread of a forked process reads."""
    return ThreadPoolExecutor(1, 'raster')
