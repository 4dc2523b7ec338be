"""Sources of images: the abilities that a dataset may have beyond TorchGeo's.

Any TorchGeo ``GeoDataset`` serves as it is. One that is a :class:`Source` besides has
its images fetched many at a time and ahead of their use;
:class:`~dynamicvis_geo.datasets.remote.RemoteDataset` makes one of a function that
downloads one image. A chip without an image is a :class:`ChipFailure`.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import (
    Any,
    Literal,
    NamedTuple,
    Protocol,
    TypeAlias,
    get_args,
    runtime_checkable,
)

from pyproj import CRS
from rasterio.errors import RasterioError
from torchgeo.datasets import GeoDataset, IntersectionDataset, UnionDataset

from dynamicvis_geo.earthengine.limiter import CancelledError
from dynamicvis_geo.errors import (
    AuthenticationError,
    EarthEngineError,
    PermissionDeniedError,
    ProjectError,
    QuotaError,
    ServerError,
    SessionError,
    SourceError,
    SpecError,
    UnavailableError,
    causes_of,
)
from dynamicvis_geo.projections import crs_name
from dynamicvis_geo.provenance import Described

Sample = dict[str, Any]
#: Slices of x, y and time that index a dataset: west, east and width of a pixel; south,
#: north and height of a pixel; first and last moment.
GeoSlice = tuple[slice, slice, slice]
OnError = Literal['raise', 'skip']

_OF_A_CHIP = (EarthEngineError, SourceError, OSError, RasterioError)
_OF_THE_RUN = (
    AuthenticationError,
    PermissionDeniedError,
    ProjectError,
    QuotaError,
    ServerError,
    SessionError,
    UnavailableError,
)
#: Lacks of the system, for this chip and for any other.
_LACKS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT)


class ChipFailure(NamedTuple):
    """A chip without an image, in place of its sample.

    Attributes:
        chip: Its row in :attr:`~dynamicvis_geo.datasets.ChipDataset.chips`; from a
            source itself, the position of its query.
        reason: Name of the error, such as ``'NoImageryError'``.
        message: Text of the error.
    """

    chip: int
    reason: str
    message: str

    @classmethod
    def of(cls, chip: int, error: Exception) -> ChipFailure:
        """Describe the error of a chip.

        Args:
            chip: Its row, or the position of its query.
            error: The error.
        """
        return cls(chip, type(error).__name__, str(error))


#: The sample of a chip, or its failure.
Found: TypeAlias = Sample | ChipFailure
#: Waits for samples that are under way, and gives them or raises an error.
Pending: TypeAlias = Callable[[], list[Found]]


class Survey(NamedTuple):
    """The effort of fetching some chips.

    Attributes:
        cached: Chips that are in the cache already.
        requests: Requests for the others.
        bytes: Bytes of pixels that these receive.
    """

    cached: int = 0
    requests: int = 0
    bytes: int = 0

    @classmethod
    def total(cls, parts: Iterable[Survey], times: float = 1.0) -> Survey:
        """Add surveys up, and multiply the sum.

        Args:
            parts: The surveys.
            times: Factor, such as all chips over those surveyed.
        """
        sums = map(sum, zip(cls(), *parts, strict=True))
        return cls(*(round(times * value) for value in sums))


@runtime_checkable
class Source(Described, Protocol):
    """A dataset that fetches the images of many queries at once."""

    @property
    def concurrency(self) -> int:
        """Requests that this process may have in flight; 0 if it makes none."""

    @property
    def retries(self) -> int:
        """Requests that this object has repeated in this process."""

    def submit(
        self,
        queries: Sequence[GeoSlice],
        on_error: OnError = 'skip',
        cancelled: threading.Event | None = None,
    ) -> Pending:
        """Start to fetch samples in the background; nothing is raised here.

        Args:
            queries: Slices (x, y, t).
            on_error: ``'skip'`` puts a :class:`ChipFailure` in the place of a sample
                whose error :func:`concerns_one_chip`; ``'raise'`` raises it.
            cancelled: Gives up when set.

        Returns:
            A function that waits, and returns samples and failures in the order of the
            queries. A failure counts these from 0.
        """

    def survey(self, queries: Sequence[GeoSlice]) -> Survey:
        """Count the requests that fetching would take; nothing is fetched.

        Args:
            queries: Slices (x, y, t).

        Returns:
            Requests, their bytes, and chips that are in a cache.
        """


def as_source(dataset: GeoDataset) -> Source:
    """Return a dataset as a :class:`Source`.

    Args:
        dataset: A source itself; TorchGeo's intersection (``&``) with one, whose images
            are fetched as its own are; or anything else, which is read chip by chip
            when the samples are waited for.
    """
    if isinstance(dataset, Source):
        return dataset
    if type(dataset) is IntersectionDataset:
        return _Intersection(dataset)
    return _Files(dataset)


class _Files:
    """A dataset without threads of its own, as files are read."""

    concurrency = retries = 0

    def __init__(self, dataset: GeoDataset) -> None:
        self.dataset = dataset

    @property
    def provenance(self) -> dict[str, Any]:
        dataset = self.dataset
        return dataset.provenance if isinstance(dataset, Described) else {}

    def survey(self, queries: Sequence[GeoSlice]) -> Survey:
        return Survey()

    def submit(
        self,
        queries: Sequence[GeoSlice],
        on_error: OnError = 'skip',
        cancelled: threading.Event | None = None,
    ) -> Pending:
        def read() -> list[Found]:
            if cancelled is not None and cancelled.is_set():
                raise CancelledError
            return [
                found if isinstance(found, dict) else _failure(i, found)
                for i, found in enumerate(self._read(queries, on_error))
            ]

        return read

    def _read(
        self, queries: Sequence[GeoSlice], on_error: OnError
    ) -> Sequence[Sample | Exception | None]:
        """Ask once where the dataset takes many queries, so that it may be quick."""
        many = getattr(self.dataset, '__getitems__', None)
        if many is not None:
            try:
                samples: Sequence[Sample | None] = many(queries)
                return samples
            except Exception as error:
                if on_error == 'raise' or not concerns_one_chip(error):
                    raise
        return [self._read_one(query, on_error) for query in queries]

    def _read_one(
        self, query: GeoSlice, on_error: OnError
    ) -> Sample | Exception | None:
        try:
            sample: Sample | None = self.dataset[query]
        except Exception as error:
            if on_error == 'raise' or not concerns_one_chip(error):
                raise
            return error
        return sample


class _Intersection:
    """TorchGeo's intersection of datasets, each fetched as it is best fetched."""

    def __init__(self, dataset: IntersectionDataset) -> None:
        self.dataset = dataset
        self.parts = [as_source(part) for part in dataset.datasets]

    @property
    def concurrency(self) -> int:
        return max(part.concurrency for part in self.parts)

    @property
    def retries(self) -> int:
        return sum(part.retries for part in self.parts)

    @property
    def provenance(self) -> dict[str, Any]:
        return {}

    def survey(self, queries: Sequence[GeoSlice]) -> Survey:
        return Survey.total(part.survey(queries) for part in self.parts)

    def submit(
        self,
        queries: Sequence[GeoSlice],
        on_error: OnError = 'skip',
        cancelled: threading.Event | None = None,
    ) -> Pending:
        pending = [part.submit(queries, on_error, cancelled) for part in self.parts]
        return lambda: [
            self._join(found)
            for found in zip(*(wait() for wait in pending), strict=True)
        ]

    def _join(self, found: Sequence[Found]) -> Found:
        samples = []
        for one in found:
            if isinstance(one, ChipFailure):
                return one
            samples.append(one)
        sample: Sample = self.dataset.collate_fn(samples)
        transforms = self.dataset.transforms
        return sample if transforms is None else transforms(sample)


def _failure(position: int, found: Exception | None) -> ChipFailure:
    if found is None:
        reason = 'its dataset gives None, and no reason'
        return ChipFailure(position, 'NoSampleError', reason)
    return ChipFailure.of(position, found)


def describe(dataset: GeoDataset, sampler: Iterable[Any]) -> dict[str, Any]:
    """Describe what chips are cut from, and by which sampler, for JSON.

    Args:
        dataset: The dataset.
        sampler: Its sampler.

    Returns:
        Class, CRS, resolution, bands and files of the dataset, and the sampler; with
        the ``provenance`` that they have of their own.
    """
    own = sampler.provenance if isinstance(sampler, Described) else {}
    return {
        **_describe_dataset(dataset),
        'sampler': {'name': type(sampler).__name__, **own},
    }


def _describe_dataset(dataset: GeoDataset) -> dict[str, Any]:
    described: dict[str, Any] = {
        'dataset': type(dataset).__name__,
        'crs': crs_name(CRS.from_user_input(dataset.crs)),
        'res': [float(res) for res in dataset.res],
    }
    if isinstance(dataset, IntersectionDataset | UnionDataset):
        described['datasets'] = [_describe_dataset(part) for part in dataset.datasets]
    # An attribute of TorchGeo's raster datasets.
    bands = getattr(dataset, 'bands', None)
    if bands:
        described['bands'] = [
            band if isinstance(band, str) else int(band) for band in bands
        ]
    if 'filepath' in dataset.index:
        files = sorted(
            os.path.basename(str(path)) for path in dataset.index['filepath']
        )
        described['files'] = {'count': len(files), 'first': files[:3]}
    own = dataset.provenance if isinstance(dataset, Described) else {}
    return {**described, **own}


def check_on_error(on_error: str) -> None:
    """Refuse anything else than an :data:`OnError`.

    Args:
        on_error: The value.

    Raises:
        SpecError: If *on_error* is neither 'raise' nor 'skip'.
    """
    if on_error not in get_args(OnError):
        raise SpecError(f"on_error={on_error!r} must be 'raise' or 'skip'")


def concerns_one_chip(error: BaseException) -> bool:
    """Tell if an error is about one chip, so that others may be had all the same.

    Errors about the network, a full disk, too many open files, the account, the
    project or its quota, about arguments, and mistakes in programs concern the whole
    run.

    Args:
        error: Raised by a dataset.
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
