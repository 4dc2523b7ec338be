import ctypes
import gc
import os
from collections.abc import Iterator

# Before NumPy and PyTorch are imported: threads of theirs that wait for one another by
# spinning take most of the processor time of small products, here and in children.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import psutil
import pytest

from tests.earthengine_server.fixtures import running_server, server
from tests.processes import start
from tests.stores import bucket, s3_server, store, upload, web

# Of the session: a module that imports them has servers of its own.
__all__ = (
    'bucket',
    'running_server',
    's3_server',
    'server',
    'start',
    'store',
    'upload',
    'web',
)

#: Bytes by which a process may grow before what is garbage in it is collected.
GROWTH = 2**28

#: Gives memory back to the system, where the C library is glibc.
_trim = getattr(ctypes.CDLL(None), 'malloc_trim', None) if os.name == 'posix' else None
_process = psutil.Process()
_size = 0


@pytest.fixture(autouse=True)
def little_garbage() -> Iterator[None]:
    """Let no models pile up: they are in cycles with their Trainer.

    Python's garbage collector counts objects, of which these have few, and not bytes;
    and what is freed in small pieces, the C library keeps.
    """
    global _size
    yield
    if _process.memory_info().rss > _size + GROWTH:
        gc.collect()
        if _trim is not None:
            _trim(0)
        _size = _process.memory_info().rss
