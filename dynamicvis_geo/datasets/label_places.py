"""Which label belongs to which chip, by place."""

from __future__ import annotations

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from pyproj import Geod, Transformer
from scipy.spatial import KDTree

from dynamicvis_geo.errors import SpecError

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

#: Points that differ less in their distance are equally near, metres.
TIE_M = 1e-3


def nearest_pairs(lonlat: Floats, points: Floats, max_distance_m: float) -> Rows:
    """Find the points nearest to each chip.

    Distances are geodesics on the WGS 84 ellipsoid. Which point is nearest is found by
    the straight lines through the Earth, which keep the order, know no antimeridian,
    and end at the poles like anywhere else.

    Args:
        lonlat: Centres of chips, degrees, ``[n, 2]``.
        points: Places of labels, degrees, ``[m, 2]``.
        max_distance_m: Greatest distance along the ground.

    Returns:
        Pairs of a chip and a label, int64 ``[k, 2]``: several for a chip that has
        several points at the same distance.
    """
    tree = KDTree(_through_earth(points))
    usable = np.flatnonzero(np.isfinite(lonlat).all(axis=1))
    centres = _through_earth(lonlat[usable])
    chord, first = tree.query(centres)
    ground = _ground(lonlat[usable], points[first])
    near = ground <= max_distance_m
    usable, centres, chord = usable[near], centres[near], chord[near]
    ties = tree.query_ball_point(centres, chord + TIE_M)
    counts = np.array([len(tie) for tie in ties], np.int64)
    labels = np.concatenate([np.empty(0, np.int64), *ties]).astype(np.int64)
    return np.stack([np.repeat(usable, counts), labels], axis=1)


def containing_pairs(lonlat: Floats, polygons: gpd.GeoSeries) -> Rows:
    """Find the polygons that contain the centre of each chip.

    Args:
        lonlat: Centres of chips, degrees, ``[n, 2]``.
        polygons: Places of labels, in any CRS.

    Returns:
        Pairs of a chip and a label, int64 ``[k, 2]``, by chip.
    """
    # The centres go to the polygons: sides stay as straight as they were drawn.
    to_labels = Transformer.from_crs('EPSG:4326', polygons.crs, always_xy=True)
    x, y = to_labels.transform(*lonlat.T)
    usable = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    centres = shapely.points(np.asarray(x)[usable], np.asarray(y)[usable])
    tree = shapely.STRtree(polygons.to_numpy())
    chips, labels = tree.query(centres, predicate='intersects')
    return _sorted_pairs(usable[chips], labels)


def inside_pairs(lonlat: Floats, footprints: gpd.GeoSeries, points: Floats) -> Rows:
    """Find the point inside the footprint of each chip that is nearest to its centre.

    Args:
        lonlat: Centres of chips, degrees, ``[n, 2]``.
        footprints: Their outlines, EPSG:4326, cut at the antimeridian.
        points: Places of labels, degrees, ``[m, 2]``.

    Returns:
        Pairs of a chip and a label, int64 ``[k, 2]``, by chip: several where the same
        distance is nearest.
    """
    tree = shapely.STRtree(shapely.points(_wrapped(points)))
    chips, labels = tree.query(footprints.to_numpy(), predicate='intersects')
    pairs = _sorted_pairs(chips, labels)
    if not len(pairs):
        return pairs
    ground = pd.Series(_ground(lonlat[pairs[:, 0]], points[pairs[:, 1]]))
    nearest = ground.groupby(pairs[:, 0]).transform('min')
    return pairs[(ground <= nearest + TIE_M).to_numpy()]


def centres_of(table: pd.DataFrame) -> Floats:
    """Return longitude and latitude of the centres of chips, ``[n, 2]``.

    Raises:
        SpecError: If the table does not hold them.
    """
    names = ['centre_lon', 'centre_lat']
    missing = [name for name in names if name not in table]
    if missing:
        raise SpecError(
            f'the embeddings have no column {missing[0]!r}, to join labels by place: '
            "join them by id, with how='id'"
        )
    return table[names].to_numpy(np.float64)


def _sorted_pairs(chips: Rows, labels: Rows) -> Rows:
    order = np.lexsort((labels, chips))
    return np.stack([chips[order], labels[order]], axis=1).astype(np.int64)


def _through_earth(lonlat: Floats) -> Floats:
    to_centre = Transformer.from_crs('EPSG:4979', 'EPSG:4978', always_xy=True)
    height = np.zeros(len(lonlat))
    return np.stack(to_centre.transform(lonlat[:, 0], lonlat[:, 1], height), axis=1)


def _ground(one: Floats, two: Floats) -> Floats:
    distance: Floats
    _, _, distance = Geod(ellps='WGS84').inv(*one.T, *two.T)
    return np.asarray(distance)


def _wrapped(points: Floats) -> Floats:
    lon, lat = points.T
    return np.stack([np.where(np.abs(lon) > 180, (lon + 180) % 360 - 180, lon), lat], 1)
