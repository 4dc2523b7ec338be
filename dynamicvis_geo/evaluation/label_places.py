"""Labels by place: where they lie, and the chips that they belong to."""

from __future__ import annotations

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from numpy.typing import NDArray
from pyproj import Geod, Transformer
from scipy.spatial import KDTree

from dynamicvis_geo.datasets.requests import read_area
from dynamicvis_geo.datasets.vector_files import place_table
from dynamicvis_geo.errors import SourceError, SpecError

Floats = NDArray[np.float64]

#: Points that differ less in their distance are equally near, metres.
TIE_M = 1e-3


def has_places(labels: pd.DataFrame) -> bool:
    """Tell if a table has geometries, or columns of longitudes and latitudes.

    Args:
        labels: The table.

    Returns:
        True if it has.
    """
    if isinstance(labels, gpd.GeoDataFrame):
        return True
    try:
        place_table(labels.head(0), 'labels')
    except SourceError:
        return False
    return True


def pairs_by_place(
    table: pd.DataFrame,
    labels: pd.DataFrame,
    max_distance_m: float | None,
    source: str,
) -> tuple[pd.DataFrame, str]:
    """Find the labels of each chip by place.

    Args:
        table: Chips, with ``centre_lon`` and ``centre_lat`` in degrees, and for point
            labels without *max_distance_m* their footprints, EPSG:4326, cut at the
            antimeridian.
        labels: Labels with places: all points, or all polygons.
        max_distance_m: Greatest distance of the nearest point along the ground; None
            for points in footprints, and for polygons that contain the centres.
        source: Name of the labels, for errors.

    Returns:
        Pairs of positions, ``chip`` and ``label``, several of a chip where it has
        several labels; and how they were found, in words.

    Raises:
        SourceError: If labels have no places, or different kinds of places.
        SpecError: If chips have no places, or the labels are none that can be nearest.
    """
    places = _geometries(labels, source)
    centres = _centres(table)
    are_points = (places.geom_type == 'Point').all()
    if max_distance_m is not None:
        if not are_points:
            raise SpecError(
                f"{source}: labels are polygons, and how='nearest' is for points: use "
                "how='within', without max_distance_m"
            )
        pairs = _nearest(centres, _lonlat(places), max_distance_m)
        return pairs, f'to the nearest point within {max_distance_m:g} m'
    if not are_points:
        # The centres go to the polygons: sides stay as straight as they were drawn.
        return _pairs(centres.to_crs(places.crs), places), (
            'to polygons around chip centres'
        )
    if not isinstance(table, gpd.GeoDataFrame):
        raise SpecError(
            'table has no footprints, which point labels are to lie within: give '
            "PooledEmbeddings.table, or use how='nearest'"
        )
    return _inside(centres, table.geometry, _lonlat(places)), (
        'to points within footprints'
    )


def _geometries(labels: pd.DataFrame, source: str) -> gpd.GeoSeries:
    """Return points in EPSG:4326; or valid polygons.

    Polygons in degrees come in EPSG:4326, cut at the antimeridian; others keep their
    CRS.
    """
    if not isinstance(labels, gpd.GeoDataFrame):
        labels = place_table(labels, source)
    places = labels.geometry
    if places.crs is None:
        raise SourceError(f'{source}: has no CRS: name it with set_crs or in the file')
    missing = places.isna() | places.is_empty
    if missing.any():
        raise SourceError(
            f'{source}: {missing.sum()} of {len(places)} labels have no geometry (the '
            f'first is in row {missing.argmax() + 1}): remove them, or join by id'
        )
    kinds = set(places.geom_type)
    if kinds == {'MultiPoint'} and (shapely.get_num_geometries(places) == 1).all():
        # Some formats know no single points.
        places = gpd.GeoSeries(shapely.get_geometry(places, 0), crs=places.crs)
        kinds = {'Point'}
    if kinds == {'Point'}:
        return places.to_crs('EPSG:4326')
    if not kinds <= {'Polygon', 'MultiPolygon'}:
        raise SourceError(
            f'{source}: labels are {" and ".join(sorted(kinds))}: a place is a point '
            'or a polygon, the same in all rows'
        )
    if not places.crs.is_geographic:
        return places.make_valid()
    try:
        return read_area(places.to_crs('EPSG:4326'))
    except SpecError as error:
        raise SourceError(f'{source}: {error}') from error


def _centres(table: pd.DataFrame) -> gpd.GeoSeries:
    names = ['centre_lon', 'centre_lat']
    missing = [name for name in names if name not in table]
    if missing:
        raise SpecError(
            f'the embeddings have no column {missing[0]!r}, to join labels by place: '
            "join them by id, with how='id'"
        )
    return gpd.GeoSeries.from_xy(*table[names].to_numpy(np.float64).T, crs='EPSG:4326')


def _pairs(chips: gpd.GeoSeries, labels: gpd.GeoSeries) -> pd.DataFrame:
    """Return the pairs that touch, positions as ``chip`` and ``label``."""
    left, right = (
        gpd.GeoDataFrame({name: np.arange(len(shapes))}, geometry=shapes.array)
        for name, shapes in (('chip', chips), ('label', labels))
    )
    pairs: pd.DataFrame = left.sjoin(right, predicate='intersects')
    return pairs[['chip', 'label']]


def _inside(
    centres: gpd.GeoSeries, footprints: gpd.GeoSeries, points: Floats
) -> pd.DataFrame:
    """Of the points inside each footprint, take those nearest to its centre."""
    lon, lat = points.T
    turned = np.where(np.abs(lon) > 180, (lon + 180) % 360 - 180, lon)
    found = _pairs(
        footprints, gpd.GeoSeries.from_xy(turned, lat, crs=footprints.crs)
    ).reset_index(drop=True)
    ground = pd.Series(
        _ground(_lonlat(centres)[found['chip']], points[found['label']]),
        index=found.index,
    )
    nearest = ground.groupby(found['chip']).transform('min')
    return found[ground <= nearest + TIE_M]


def _nearest(
    centres: gpd.GeoSeries, points: Floats, max_distance_m: float
) -> pd.DataFrame:
    """Find the points nearest to each centre, all that are equally near.

    Distances are geodesics on the WGS 84 ellipsoid. The nearest is found by the
    straight lines through the Earth, which keep the order, know no antimeridian, and
    end at the poles like anywhere else.
    """
    tree = KDTree(_through_earth(points))
    lonlat = _lonlat(centres)
    usable = np.flatnonzero(np.isfinite(lonlat).all(axis=1))
    chord, first = tree.query(_through_earth(lonlat[usable]))
    near = _ground(lonlat[usable], points[first]) <= max_distance_m
    usable, chord = usable[near], chord[near]
    ties = tree.query_ball_point(_through_earth(lonlat[usable]), chord + TIE_M)
    found = pd.DataFrame({'chip': usable, 'label': pd.Series(ties, dtype=object)})
    return found.explode('label').astype(np.int64)


def _lonlat(points: gpd.GeoSeries) -> Floats:
    return np.stack([points.x, points.y], axis=1)


def _through_earth(lonlat: Floats) -> Floats:
    to_centre = Transformer.from_crs('EPSG:4979', 'EPSG:4978', always_xy=True)
    height = np.zeros(len(lonlat))
    return np.stack(to_centre.transform(lonlat[:, 0], lonlat[:, 1], height), axis=1)


def _ground(one: Floats, two: Floats) -> Floats:
    distance: Floats
    _, _, distance = Geod(ellps='WGS84').inv(*one.T, *two.T)
    return np.asarray(distance)
