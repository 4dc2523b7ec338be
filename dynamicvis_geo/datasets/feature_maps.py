"""Feature maps as a raster dataset."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd
from pyproj import CRS
from torchgeo.datasets import RasterDataset
from torchgeo.datasets.utils import GeoSlice
from upath import UPath

from dynamicvis_geo.datasets._torchgeo import forget_file_handles, in_one_line
from dynamicvis_geo.datasets.scene_files import find_files, window_of_name
from dynamicvis_geo.datasets.source import Sample
from dynamicvis_geo.errors import SourceError, SpecError
from dynamicvis_geo.formats.geotiff import Header, read_header
from dynamicvis_geo.paths import AnyPath, input_path
from dynamicvis_geo.provenance import find_provenance
from dynamicvis_geo.rasters import apart_from_parent, gdal_env, gdal_name
from dynamicvis_geo.time_window import ALWAYS, TimeWindow

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class FeatureMaps(RasterDataset):
    """The feature maps that :class:`~dynamicvis_geo.EmbeddingWriter` wrote.

    A sample holds ``image``, float32 ``[D, h, w]``, and the georeference keys of the
    installed TorchGeo. A cell is as wide as the files say, which is many pixels of the
    images; where no file lies, it is 0. Queries off the cells' lattice are resampled
    (bilinear). ``maps & labels`` pairs the cells with a dataset of label rasters,
    resampled to them.

    A file's time window is what its tags ``start`` and ``end`` say, else the day in its
    name, else all of time.

    Attributes:
        provenance: What made the features, as the first file says.
    """

    filename_glob = '*'

    def __init__(
        self,
        paths: AnyPath | Iterable[AnyPath],
        crs: Any = None,
        res: float | tuple[float, float] | None = None,
        transforms: Callable[[Sample], Sample] | None = None,
        cache: bool = True,
    ) -> None:
        """Open feature maps.

        Args:
            paths: GeoTIFF files, or folders of them; or URLs of such.
            crs: CRS to warp to; the files' own if left out.
            res: Size of a cell in units of that CRS; that of the first file if left
                out.
            transforms: A function of a sample that returns a transformed sample.
            cache: Whether to keep files open.

        Raises:
            SourceError: If there is no file, one of them cannot be read, or they have
                different numbers of bands or models.
            SpecError: If the files have several CRSs and *crs* names none.
        """
        if isinstance(paths, str | os.PathLike | UPath):
            paths = [paths]
        files = [file for path in paths for file in find_files(input_path(path))]
        files = list(dict.fromkeys(files))
        if not files:
            raise SourceError('paths names no file: give GeoTIFFs, or folders of them')
        headers = [read_header(file) for file in files]
        _refuse_mixed(headers, crs)
        self.provenance = find_provenance(files[0]) or {}
        self._files = sorted(gdal_name(file) for file in files)
        with gdal_env():
            super().__init__(
                self._files,
                crs=None if crs is None else CRS.from_user_input(crs),
                res=res,
                transforms=transforms,
                cache=cache,
            )
        windows = {gdal_name(header.path): _window(header) for header in headers}
        self.index.index = pd.IntervalIndex(
            [windows[path].interval for path in self.index['filepath']],
            closed='both',
            name='datetime',
        )
        self._process = os.getpid()

    def __repr__(self) -> str:
        """Count the files, and say where they are."""
        return in_one_line(self)

    @property
    def files(self) -> list[str]:
        """Names that GDAL has for the files."""
        return self._files

    def __getitem__(self, query: GeoSlice) -> Sample:
        """Read the cells of a query.

        Args:
            query: ``[xmin:xmax:xres, ymin:ymax:yres, tmin:tmax:tres]`` to index.

        Raises:
            IndexError: If no file lies in *query*.
        """
        if os.getpid() != self._process:
            forget_file_handles()
            self._process = os.getpid()
        return apart_from_parent(partial(self._read, query))

    def _read(self, query: GeoSlice) -> Sample:
        with gdal_env():
            sample: Sample = super().__getitem__(query)
        return sample

    def plot(
        self, sample: Sample, show_titles: bool = True, suptitle: str | None = None
    ) -> Figure:
        """Draw the main three components of a sample as red, green and blue.

        Args:
            sample: What indexing gave.
            show_titles: Whether to write the size of the map above it.
            suptitle: Written above all.
        """
        from matplotlib.figure import Figure

        from dynamicvis_geo.plotting import fit_map_colours, map_picture

        features = sample['image'].cpu().numpy()
        channels, height, width = features.shape
        figure = Figure(figsize=(5, 5.4), layout='constrained')
        axes = figure.subplots()
        colours = fit_map_colours([features])
        axes.imshow(map_picture(colours, features), interpolation='nearest')
        axes.set_axis_off()
        if show_titles:
            axes.set_title(
                f'{width} x {height} cells, {channels} channels\nPCA: {colours.shares}'
            )
        if suptitle is not None:
            figure.suptitle(suptitle)
        return figure


def _window(header: Header) -> TimeWindow:
    start, last = header.window
    if start is not None and last is not None:
        return TimeWindow.closed(start, last)
    # Digits in the name that the writer gives are those of a place.
    named = 'chip_id' in header.tags
    return ALWAYS if named else window_of_name(header.path.stem)


def _refuse_mixed(headers: list[Header], crs: Any) -> None:
    first = headers[0]
    for header in headers:
        bands, expected = header.shape[0], first.shape[0]
        if bands != expected:
            raise SourceError(
                f'{header.path} has {bands} bands, {first.path} has {expected}: the '
                'maps of one model have the same number; keep others elsewhere'
            )
        if crs is None and header.crs != first.crs:
            raise SpecError(
                f'{header.path} is in {header.crs.to_string()}, {first.path} in '
                f'{first.crs.to_string()}: open the files of each CRS on their own, or '
                'name the one to warp them to with crs='
            )
