"""Checkpoint files: refused if they are something else, loaded without running code.

``torch.load(weights_only=True)`` admits tensors and plain containers alone. Checkpoints
of MMEngine hold its log buffers beside the weights, whose class is not installed here.
For these, inert stand-ins are registered, which take any state and keep none of it; a
file that asks for anything else is refused.
"""

import contextlib
import pickle
import pickletools
import re
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from dynamicvis_geo.errors import CheckpointError

# MMEngine's HistoryBuffer holds numpy arrays, and its own methods, which are pickled as
# calls of `getattr`; the stand-in for that looks nothing up.
_STOOD_IN_FOR = frozenset(
    {
        'builtins.getattr',
        'numpy.dtype',
        'numpy.ndarray',
        'numpy.core.multiarray._reconstruct',
        'numpy.core.multiarray.scalar',
        'numpy._core.multiarray._reconstruct',
        'numpy._core.multiarray.scalar',
    }
)
_OPENMMLAB = frozenset(
    {'dynamicvis', 'mmcv', 'mmdet', 'mmengine', 'mmpretrain', 'mmseg', 'opencd'}
)
# Of these PyTorch itself knows which names are safe.
_JUDGED_BY_TORCH = frozenset({'_codecs', 'collections', 'torch'})

# What parsing a damaged archive or pickle raises, in PyTorch and the standard library.
_DAMAGED = (
    RuntimeError,
    EOFError,
    OSError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def read_head(path: Path) -> bytes:
    """Read the first bytes of a file.

    Args:
        path: The file.

    Returns:
        Up to 512 bytes.

    Raises:
        CheckpointError: If it cannot be a checkpoint; it says what it is instead.
    """
    if not path.is_file():
        what = 'is not a file' if path.exists() else 'does not exist'
        raise CheckpointError(f'{path} {what}: give the path of a checkpoint file')
    try:
        with path.open('rb') as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(
            f'{path} cannot be read ({error.strerror}): check its permissions'
        ) from error
    if not head:
        raise CheckpointError(f'{path} is empty: delete it and download it again')
    if head.startswith(b'version https://git-lfs'):
        raise CheckpointError(
            f'{path} is a Git-LFS pointer, not the file itself: run `git lfs pull` in '
            'its repository, or download the file'
        )
    if re.match(rb'\s*<(!doctype|html|\?xml|head)', head, re.IGNORECASE):
        raise CheckpointError(
            f'{path} is a web page, not a checkpoint: download the file itself (on '
            'Hugging Face from the address with /resolve/, not /blob/)'
        )
    if not is_safetensors(head) and not head.startswith((b'PK\x03\x04', b'\x80')):
        raise CheckpointError(
            f'{path} is neither a PyTorch nor a safetensors file: give a checkpoint'
        )
    return head


def is_safetensors(head: bytes) -> bool:
    """Tell a safetensors file by its first bytes.

    Args:
        head: The first 9 bytes, or more.

    Returns:
        True if a header of JSON begins where safetensors has it.
    """
    # Eight bytes of the JSON header's length, little-endian, then the header.
    return head[4:9] == b'\0\0\0\0{'


def load_weights_only(path: Path) -> object:
    """Load what ``torch.save`` wrote; foreign harmless objects become inert ones.

    Args:
        path: The file. The tensors of an archive are mapped from it: copy those that
            are wanted; the others (an optimizer's state, twice the size of the weights)
            take no memory.

    Returns:
        The object in the file, as a rule a dict.

    Raises:
        CheckpointError: If the file is truncated or damaged, or asks for anything that
            could run code.
    """
    import torch

    with path.open('rb') as file:
        is_archive = file.read(2) == b'PK'
    if is_archive and not zipfile.is_zipfile(path):
        raise CheckpointError(
            f'{path} is cut short ({path.stat().st_size} bytes): delete it and '
            'download it again'
        )
    try:
        inert = _inert_classes(path, _names_in(path)) if is_archive else []
        with _only_allowed(inert):
            return torch.load(
                path, map_location='cpu', weights_only=True, mmap=is_archive
            )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f'{path} is refused, because loading it could run code, or it is damaged '
            f'({_reason(error)}): use a file from a source that you trust'
        ) from error
    except _DAMAGED as error:
        raise CheckpointError(
            f'{path} is damaged, or no checkpoint ({_reason(error)}): delete it and '
            'download it again'
        ) from error


def _reason(error: Exception) -> str:
    """Return what is the matter, without PyTorch's advice to load unsafely."""
    text = str(error).partition('WeightsUnpickler error: ')[2] or str(error)
    sentence = re.split(r' by default|\. |\n', text.strip(), maxsplit=1)[0]
    return sentence.rstrip('.') or type(error).__name__


class _Inert:
    """An inert object in place of a foreign one: accepts anything, keeps nothing."""

    def __new__(cls, *args: object) -> '_Inert':
        return super().__new__(cls)

    def __init__(self, *args: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def _names_in(path: Path) -> set[str]:
    """Check an archive; return the dotted names of all that its pickle refers to."""
    with zipfile.ZipFile(path) as archive:
        # PyTorch compares no checksums, and a hole in a download is silent otherwise.
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f'wrong checksum of {damaged}')
        entries = [name for name in archive.namelist() if name.endswith('/data.pkl')]
        if not entries:
            raise zipfile.BadZipFile('a zip archive without data.pkl')
        operations = pickletools.genops(archive.read(entries[0]))
        names = [str(arg) for code, arg, _ in operations if code.name == 'GLOBAL']
    return {
        re.sub('^__builtin__ ', 'builtins ', name).replace(' ', '.') for name in names
    }


def _inert_classes(path: Path, names: set[str]) -> list[type[_Inert]]:
    """Return inert classes for the harmless foreign names; refuse any other name."""
    classes = []
    for name in sorted(names):
        module, _, attribute = name.rpartition('.')
        package = module.partition('.')[0]
        if package in _JUDGED_BY_TORCH:
            continue
        # Classes only, by their capital: no checkpoint needs to call a function.
        is_class = package in _OPENMMLAB and attribute[:1].isupper()
        if name not in _STOOD_IN_FOR and not is_class:
            raise CheckpointError(
                f'{path} is refused, because it asks for {name} on loading, which '
                'could run code: use a file from a source that you trust'
            )
        # These two attributes are all that PyTorch before 2.7 finds an entry by.
        classes.append(type(attribute, (_Inert,), {'__module__': module}))
    return classes


_registry = threading.Lock()


@contextlib.contextmanager
def _only_allowed(classes: list[type[_Inert]]) -> Iterator[None]:
    """Allow these classes on loading, and none that other packages have registered.

    Others register numpy's real functions, which fail on arguments that are stand-ins.
    """
    import torch

    with _registry:
        others = list(torch.serialization.get_safe_globals())
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals([*classes])
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(others)
