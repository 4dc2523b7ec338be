"""Chips whose image cannot be had: which errors are of one chip, and how to tell."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

from rasterio.errors import RasterioError

from dynamicvis_geo.earthengine.failures import causes_of
from dynamicvis_geo.errors import (
    AuthenticationError,
    EarthEngineError,
    PermissionDeniedError,
    ProjectError,
    QuotaError,
    SessionError,
    SourceError,
    SpecError,
    UnavailableError,
)

Sample = dict[str, Any]
OnError = Literal['raise', 'skip']

_OF_A_CHIP = (EarthEngineError, SourceError, OSError, RasterioError)
_OF_THE_RUN = (
    AuthenticationError,
    PermissionDeniedError,
    ProjectError,
    QuotaError,
    SessionError,
    UnavailableError,
)
#: What the system lacks, for this chip and for any other.
_LACKS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT)


class ChipFailure(NamedTuple):
    """A chip without an image, in place of its sample.

    Attributes:
        chip: Its row in :attr:`~dynamicvis_geo.datasets.ChipDataset.chips`.
        reason: Name of the error, such as ``'NoImageryError'``.
        message: What the error says.
    """

    chip: int
    reason: str
    message: str

    @classmethod
    def of(cls, chip: int, error: Exception) -> ChipFailure:
        """Describe the error of a chip."""
        return cls(chip, type(error).__name__, str(error))


def check_on_error(on_error: str) -> None:
    """Refuse what is not an :data:`OnError`.

    Raises:
        SpecError: If *on_error* is neither 'raise' nor 'skip'.
    """
    if on_error not in get_args(OnError):
        raise SpecError(f"on_error={on_error!r} must be 'raise' or 'skip'")


def concerns_one_chip(error: BaseException) -> bool:
    """Whether an error is about one chip, so that others may be had all the same.

    Errors about the network, a full disk, too many open files, the account, the
    project or its quota, about arguments, and mistakes in programs concern the whole
    run.
    """
    if type(error) is EarthEngineError and error.status is None:
        # The client library refused before it asked: it would for every chip.
        return False
    if any(map(_lacks_something, causes_of(error))):
        return False
    return isinstance(error, _OF_A_CHIP) and not isinstance(error, _OF_THE_RUN)


def _lacks_something(error: BaseException) -> bool:
    # GDAL passes on the words of the system, not its numbers.
    return getattr(error, 'errno', None) in _LACKS or (
        isinstance(error, RasterioError)
        and any(os.strerror(number) in str(error) for number in _LACKS)
    )


def fetch_each(
    dataset: Any, queries: Sequence[Any], on_error: OnError
) -> Sequence[Sample | Exception | None]:
    """Get samples from any dataset, with the errors of single chips in their place.

    Args:
        dataset: Where from. It is asked once: through its own ``fetch_each`` or
            ``__getitems__`` where it has one, which lets it fetch concurrently.
        queries: What.
        on_error: Whether an error of one chip is raised, or returned.

    Returns:
        For each query its sample, None if the dataset gives none, or its error.
    """
    each = getattr(dataset, 'fetch_each', None)
    if each is not None:
        found: Sequence[Sample | Exception | None] = each(queries, on_error)
        return found
    try:
        many = getattr(dataset, '__getitems__', None)
        found = [dataset[query] for query in queries] if many is None else many(queries)
    except Exception as error:
        if on_error == 'raise' or not concerns_one_chip(error):
            raise
        return [_fetch_one(dataset, query) for query in queries]
    return found


def _fetch_one(dataset: Any, query: Any) -> Sample | Exception | None:
    try:
        sample: Sample | None = dataset[query]
    except Exception as error:
        if not concerns_one_chip(error):
            raise
        return error
    return sample
