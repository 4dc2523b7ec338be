"""Grids of chips with made-up feature maps, and what a mosaic of them must hold."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import rasterio
import xarray as xr
from rasterio.transform import from_origin

from dynamicvis_geo.callbacks.predictions import Predictions
from dynamicvis_geo.callbacks.sink import Job
from dynamicvis_geo.callbacks.zarr_mosaic import ZarrMosaic
from dynamicvis_geo.datasets.chips import ChipDataset

D = 3
PROVENANCE = {
    'model': {'weights': 'random'},
    'source': {'images': 'made up'},
    'processing:software': {'dynamicvis-geo': '0.1.0'},
}


def scene(
    folder: Path,
    name: str = 'S2_20240601.tif',
    crs: str = 'EPSG:32618',
    corner: tuple[float, float] = (499200.0, 4500480.0),
    shape: tuple[int, int] = (96, 128),
    res: float = 10.0,
) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    with rasterio.open(
        folder / name,
        'w',
        driver='GTiff',
        dtype='uint8',
        count=1,
        height=shape[0],
        width=shape[1],
        crs=crs,
        transform=from_origin(*corner, res, res),
    ) as image:
        image.write(np.ones((1, *shape), np.uint8))


def feature_map(chip_id: str, cells: int = 4) -> np.ndarray:
    """A map that only this chip has."""
    generator = np.random.default_rng(list(chip_id.encode()))
    return generator.standard_normal((D, cells, cells)).astype(np.float32)


def predictions(chips: ChipDataset, rows: Sequence[int], cells: int = 4) -> Predictions:
    ids = chips.rows(rows)['chip_id']
    maps = np.stack([feature_map(name, cells) for name in ids])
    valid = np.abs(np.tanh(maps[:, 0, 0, 0]))
    return Predictions(np.array(rows), maps, valid)


def job(
    target: Path, chips: Any, rank: int = 0, ranks: int = 1, run: str = 'a', **kw: Any
) -> Job:
    return Job(target, rank, ranks, run, chips, PROVENANCE, None, **kw)


def drive(
    target: Path,
    chips: ChipDataset,
    ranks: int = 1,
    run: str = 'a',
    rows: Sequence[int] | None = None,
    cells: int = 4,
    batch: int = 3,
    dtype: str = 'float32',
) -> Path:
    """Do what the writer does, one rank after the other."""
    done = set(ZarrMosaic.finished(target).to_pylist())
    sinks = [
        ZarrMosaic(job(target, chips, rank, ranks, run, dtype=dtype))
        for rank in range(ranks)
    ]
    ids = chips.chips['chip_id'].tolist()
    wanted = range(len(ids)) if rows is None else rows
    todo = [i for i in wanted if ids[i] not in done]
    for rank, sink in enumerate(sinks):
        mine = todo[rank::ranks]
        for n, first in enumerate(range(0, len(mine), batch)):
            sink.write(predictions(chips, mine[first : first + batch], cells))
            if n % 2:
                sink.flush()
    for sink in sinks:
        sink.flush()
    for sink in reversed(sinks):
        sink.assemble()
    sinks[0].complete()
    return target


def expected(
    ds: Any, rows: gpd.GeoDataFrame, cells: int = 4, dtype: str = 'float32'
) -> np.ndarray:
    """What each cell must hold: cell by cell, from the bounds of the chips."""
    array = np.full(tuple(ds.sizes[n] for n in ('time', 'embedding', 'y', 'x')), np.nan)
    maps = [feature_map(name, cells).astype(dtype) for name in rows['chip_id']]
    starts = [None if pd.isna(t) else pd.Timestamp(t) for t in ds['time'].values]
    for t, row, col in np.ndindex(*(ds.sizes[n] for n in ('time', 'y', 'x'))):
        x, y = float(ds['x'][col]), float(ds['y'][row])
        found = []
        for n, chip in enumerate(rows.itertuples()):
            start = None if pd.isna(chip.start) else chip.start
            west, east, south, north = chip.minx, chip.maxx, chip.miny, chip.maxy
            if start == starts[t] and west < x < east and south < y < north:
                away = (x - (west + east) / 2) ** 2 + (y - (south + north) / 2) ** 2
                i = int((north - y) / (north - south) * cells)
                j = int((x - west) / (east - west) * cells)
                found.append((round(away, 3), -north, west, n, i, j))
        if found:
            *_, n, i, j = min(found)
            array[t, :, row, col] = maps[n][:, i, j]
    return array


def open_group(target: Path, group: str = 'EPSG_32618') -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        return xr.open_zarr(target, group=group, chunks=None)


def content(folder: Path) -> dict[str, Any]:
    # Older zarr writes the members of a group in any order.
    return {
        str(file.relative_to(folder)): json.loads(file.read_bytes())
        if file.suffix == '.json'
        else file.read_bytes()
        for file in sorted(folder.rglob('*'))
        if file.is_file()
    }


def assert_same(one: Path, two: Path) -> None:
    a, b = content(one), content(two)
    assert list(a) == list(b)
    assert [name for name in a if a[name] != b[name]] == []
