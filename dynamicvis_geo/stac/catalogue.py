"""The STAC catalogue of an output: a Collection, and an Item for each CRS."""

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from pyproj import CRS
from shapely.geometry.base import BaseGeometry

from dynamicvis_geo import terms
from dynamicvis_geo.datasets.footprints import footprints
from dynamicvis_geo.errors import OutputError, SourceError
from dynamicvis_geo.formats.base import Format
from dynamicvis_geo.formats.block_files import Blocks
from dynamicvis_geo.formats.parquet_files import (
    PARQUET_TYPE,
    Extent,
    GeoParquetWriter,
    opened,
    row_groups,
)
from dynamicvis_geo.formats.tables import (
    chip_rows,
    chip_schema,
    fit,
    row_keys,
    zone_extents,
)
from dynamicvis_geo.formats.zarr_group import group_name
from dynamicvis_geo.outputs import open_output
from dynamicvis_geo.paths import AnyPath, Place, input_path, output_path
from dynamicvis_geo.provenance import find_provenance, to_json
from dynamicvis_geo.stac.model import ALWAYS, model_item
from dynamicvis_geo.store import Location, Store

_logger = logging.getLogger(__name__)

COLLECTION, MODEL, PROVENANCE = 'collection.json', 'model.json', 'provenance.json'
ITEMS, CHIPS = 'items', 'chips.parquet'
#: All that the folder of a catalogue holds.
MEMBERS = (COLLECTION, MODEL, PROVENANCE, ITEMS, CHIPS)

# That of the schema of the extension for embeddings, which takes no other.
_VERSION = '1.0.0'
_EXTENSIONS = 'https://stac-extensions.github.io'
_EMB = f'{_EXTENSIONS}/embeddings/v0.0.1/schema.json'
_PROCESSING = f'{_EXTENSIONS}/processing/v1.2.0/schema.json'
_PROJECTION = f'{_EXTENSIONS}/projection/v2.0.0/schema.json'
_SCIENTIFIC = f'{_EXTENSIONS}/scientific/v1.0.0/schema.json'
_JSON, _GEOJSON = 'application/json', 'application/geo+json'

#: Columns of the table of chips that have files of their own, with ``location``.
_LISTED = ('id', 'point_id', 'start', 'end', 'crs', 'minx', 'miny', 'maxx', 'maxy')
#: Rows of a row group of it.
_ROW_GROUP = 50_000
#: Pixels a side of which the outline of a zone departs by a tenth at most.
_FINE = 10_000

Json = dict[str, Any]


def write_stac(path: AnyPath) -> Place:
    """Write the catalogue of an output anew, from the output itself.

    Runs write it by themselves. This is for outputs of earlier versions, and for those
    that were renamed. It reads the rows of all chips; of GeoTIFFs, every file's header.

    Args:
        path: An output; or its URL.

    Returns:
        The Collection.

    Raises:
        SourceError: If there is no output, it cannot be read, or has no chips.
        OutputError: If the catalogue cannot be written.
    """
    place = output_path(path).resolve()
    output = open_output(place, sys.maxsize)
    if not output.total:
        raise SourceError(f'{place}: it has no chips, which a catalogue could describe')
    location, cells = Location.of(str(place)), None
    if output.kind == 'grid':
        cells = tuple(int(output.chips[side].iloc[0]) for side in ('height', 'width'))
    # Of a folder of GeoTIFFs: of the last run, not of that of the first file.
    provenance = find_provenance(place) or output.provenance
    table, made = _chip_table(output.chips), output.format
    if made.chip_file is not None:
        _write_chips(location, made, [table], Extent.of(table), provenance)
    _write(location, made, provenance, zone_extents(table), cells)
    return place.parent / f'{place.name}.stac' / COLLECTION


def update_stac(made: Format, location: Location, blocks: Blocks) -> None:
    """Bring the catalogue of an output up to date, when blocks were joined into it.

    An output is worth more than its catalogue: if that cannot be written, this is said,
    and no error raised.

    Args:
        made: Format of the output.
        location: The output.
        blocks: The blocks, all rows of which have been gone through.
    """
    place = input_path(f'{location.parent.url}/{location.name}')
    try:
        provenance = find_provenance(place) or made.read_provenance(place)
        runs = [one['processing:datetime'] for one in blocks.provenance.get('runs', [])]
        before = _read_zones(location.stac, runs)
        if before is None and len(runs) > 1:
            write_stac(place)
            return
        zones = zone_extents(blocks.zones(), *([] if before is None else [before]))
        if not zones.num_rows:
            return
        shape = blocks.map_shape() if made.output == 'grid' else None
        if made.chip_file is not None:
            _update_chips(location, type(made), blocks, provenance, before is not None)
        cells = None if shape is None else shape[1:]
        _write(location, type(made), provenance, zones, cells)
    except (OutputError, SourceError) as error:
        _logger.warning(
            '%s is whole, but its STAC catalogue could not be written: %s; write_stac '
            'of dynamicvis_geo.stac writes it',
            place,
            error,
        )


def remove_stac(location: Location) -> None:
    """Remove the catalogue of an output, if there is one.

    Args:
        location: The output.

    Raises:
        OutputError: If it cannot be removed.
    """
    location.stac.remove(COLLECTION)
    items = _items(location.stac)
    for name in items.names():
        if name.endswith('.json'):
            items.remove(name)
    items.remove_if_empty()
    for name in (MODEL, PROVENANCE, CHIPS):
        location.stac.remove(name)
    location.stac.remove_if_empty()


def _items(folder: Store) -> Store:
    return Store(f'{folder.url}/{ITEMS}')


def _read_zones(folder: Store, runs: list[str]) -> pa.Table | None:
    """Read the extents that the catalogue tells, if it is of one of some runs."""
    rows = []
    try:
        content = folder.read(COLLECTION)
        if content is None:
            return None
        for link in json.loads(content)['links']:
            if link['rel'] != 'item':
                continue
            name = link['href'].rpartition('/')[2]
            item = json.loads(_items(folder).read(name) or b'')
            told = item['properties']
            if told['processing:datetime'] not in runs:
                return None
            times = (told['start_datetime'], told['end_datetime'])
            start, end = (
                None if one == never else pd.Timestamp(one)
                for one, never in zip(times, ALWAYS, strict=True)
            )
            name = told['proj:code'] or told['proj:wkt2']
            rows.append([name, *told['proj:bbox'], start, end])
        columns = list(zip(*rows, strict=True))
        return zone_extents(pa.table(columns, names=zone_extents().column_names))
    except (KeyError, TypeError, ValueError, AttributeError):
        # Somebody has edited it.
        return None


def _write(
    location: Location,
    made: type[Format],
    provenance: Mapping[str, Any],
    zones: pa.Table,
    cells: Any,
) -> None:
    """Write all but the table of chips, the Collection last."""
    folder, shared = location.stac, _Shared(location.name, made, provenance, cells)
    items = {
        f'{group_name(zone["crs"])}.json': shared.item(zone)
        for zone in zones.to_pylist()
    }
    _put(folder, PROVENANCE, provenance)
    model = model_item(provenance)
    model['links'] = [_link('root', COLLECTION, _JSON, 'The embeddings')]
    _put(folder, MODEL, model)
    for name, item in items.items():
        _put(_items(folder), name, item)
    _put(folder, COLLECTION, shared.collection(items))
    for name in set(_items(folder).names()) - items.keys():
        # What another process is writing has another end.
        if name.endswith('.json'):
            _items(folder).remove(name)


def _put(folder: Store, name: str, content: Mapping[str, Any]) -> None:
    folder.put(name, f'{to_json(content, indent=2)}\n'.encode())


def _link(rel: str, name: str, kind: str, title: str | None = None) -> Json:
    link = {'rel': rel, 'href': f'./{name}', 'type': kind}
    return link if title is None else {**link, 'title': title}


class _Shared:
    """Terms that Collection and Items of an output share."""

    def __init__(
        self, name: str, made: type[Format], provenance: Mapping[str, Any], cells: Any
    ) -> None:
        self._name, self._made = name, made
        self._provenance = provenance
        self._terms = terms.embedding_terms(provenance, cells)

    def item(self, zone: Mapping[str, Any]) -> Json:
        bounds = [zone[side] for side in ('minx', 'miny', 'maxx', 'maxy')]
        crs, name = CRS.from_user_input(zone['crs']), str(zone['crs'])
        outline = footprints(crs, np.array([bounds]), np.full((1, 2), _FINE))[0]
        coded = crs.to_authority(min_confidence=100) is not None
        links = terms.source_links(self._provenance, f'../{PROVENANCE}')
        assets = self._made.assets(self._name, name)
        for asset in assets.values():
            asset['href'] = f'../../{quote(asset["href"])}'
        if self._made.chip_file is not None:
            assets['chips'] = {
                'href': f'../{CHIPS}',
                'type': PARQUET_TYPE,
                'title': 'Names and footprints of the files, one a chip, of all CRSs',
                'roles': ['metadata'],
            }
        start, end = zone['start'], zone['end']
        return {
            'type': 'Feature',
            'stac_version': _VERSION,
            'stac_extensions': [_EMB, _PROCESSING, _PROJECTION],
            'id': group_name(name),
            'collection': self._name,
            'bbox': lonlat_bbox(outline),
            'geometry': shapely.geometry.mapping(outline),
            'properties': {
                'title': f'{self._name}, chips in {crs.name}',
                'datetime': None,
                'start_datetime': ALWAYS[0] if start is None else _iso(start),
                'end_datetime': ALWAYS[1] if end is None else _iso(end),
                **({'gsd': self._terms['gsd']} if 'gsd' in self._terms else {}),
                'proj:code': name if coded else None,
                **({} if coded else {'proj:wkt2': name}),
                'proj:bbox': bounds,
                **terms.processing_terms(self._provenance),
            },
            'links': [
                {**_link(rel, COLLECTION, _JSON), 'href': f'../{COLLECTION}'}
                for rel in ('root', 'parent', 'collection')
            ]
            + links,
            'assets': assets,
        }

    def collection(self, items: Mapping[str, Json]) -> Json:
        outlines = [shapely.geometry.shape(one['geometry']) for one in items.values()]
        whole = shapely.GeometryCollection(outlines)
        boxes = [lonlat_bbox(whole)]
        if len(items) > 1:
            boxes += [item['bbox'] for item in items.values()]
        told = [item['properties'] for item in items.values()]
        start = min(one['start_datetime'] for one in told)
        end = max(one['end_datetime'] for one in told)
        interval = [start, None if end == ALWAYS[1] else end]
        provenance = self._provenance
        return {
            'type': 'Collection',
            'stac_version': _VERSION,
            'stac_extensions': [_EMB, _PROCESSING, _SCIENTIFIC],
            'id': self._name,
            'title': f'{terms.model_title(provenance)}: {self._name}',
            'description': terms.description(provenance),
            'keywords': ['embeddings', 'remote sensing', terms.model_name(provenance)],
            'license': 'other',
            'providers': _providers(provenance),
            'extent': {
                'spatial': {'bbox': boxes},
                'temporal': {'interval': [interval]},
            },
            **self._terms,
            'sci:publications': [terms.PAPER],
            'links': [
                _link('root', COLLECTION, _JSON),
                *(_link('item', f'{ITEMS}/{name}', _GEOJSON) for name in items),
                _link('emb:model', MODEL, _GEOJSON, terms.model_title(provenance)),
                *terms.source_links(provenance, f'./{PROVENANCE}'),
            ],
            'assets': {
                'provenance': {
                    'href': f'./{PROVENANCE}',
                    'type': _JSON,
                    'title': 'Software, model, images and runs',
                    'roles': ['metadata'],
                }
            },
        }


def _iso(time: Any) -> str:
    text = time.isoformat()
    return f'{text.removesuffix("+00:00")}Z'


def _providers(provenance: Mapping[str, Any]) -> list[Json]:
    software = provenance.get('processing:software')
    providers: list[Json] = [
        {
            'name': 'dynamicvis_geo',
            'description': 'The software that computed the embeddings',
            'roles': ['processor'],
            **({'processing:software': software} if software else {}),
        }
    ]
    names = terms.collections(provenance)
    if names:
        providers.append(
            {
                'name': 'Google Earth Engine',
                'description': 'Composites of the images',
                'roles': ['host'],
                'url': 'https://earthengine.google.com',
            }
        )
    if any(name.startswith('COPERNICUS/S') for name in names):
        providers.append(
            {
                'name': 'European Union, ESA, Copernicus',
                'description': 'The images',
                'roles': ['producer', 'licensor'],
                'url': 'https://sentinels.copernicus.eu',
            }
        )
    return providers


def lonlat_bbox(geometry: BaseGeometry) -> list[float]:
    """Bound a geometry as GeoJSON does, from east to west over the antimeridian.

    Args:
        geometry: In EPSG:4326, cut at the antimeridian.

    Returns:
        West, south, east and north, degrees; west is the greater if it reaches over the
        antimeridian.
    """
    whole = geometry.bounds
    parts = shapely.get_parts(shapely.get_parts([geometry]))
    west, _, east, _ = shapely.bounds(parts).T
    if west.min() > -180 or east.max() < 180:
        return list(whole)
    # The widest gap between the parts is what the box leaves out.
    order = np.argsort(west)
    reached = np.maximum.accumulate(east[order])
    gaps = west[order][1:] - reached[:-1]
    if not len(gaps) or gaps.max() <= 0:
        return list(whole)
    widest = int(gaps.argmax())
    return [float(west[order][widest + 1]), whole[1], float(reached[widest]), whole[3]]


def _chip_table(chips: Any) -> pa.Table:
    """Return the rows of an opened output in the columns of :func:`chip_rows`."""
    rows = chips.rename(columns={'id': 'chip_id'}).assign(xres=np.nan, yres=np.nan)
    return chip_rows(rows, rows['valid_fraction'].to_numpy(np.float32))


def _update_chips(
    location: Location,
    made: type[Format],
    blocks: Blocks,
    provenance: Mapping[str, Any],
    continued: bool,
) -> None:
    """Write the table of chips: those of blocks, and those that it lists besides."""
    keys, extent, folder = blocks.keys(), blocks.extent(), location.stac

    def tables() -> Iterator[pa.Table]:
        if continued and CHIPS in folder.names():
            with opened(folder, CHIPS) as file:
                for batch in file.iter_batches(use_threads=False):
                    old = pa.Table.from_batches([batch])
                    yield old.filter(pc.invert(pc.is_in(row_keys(old), keys)))
        # A fresh one: rows are counted as they are read.
        yield from replace(blocks).rows()

    if continued and CHIPS in folder.names():
        with opened(folder, CHIPS) as file:
            extent.add(Extent.read(file.metadata.metadata))
    _write_chips(location, made, tables(), extent, provenance)


def _write_chips(
    location: Location,
    made: type[Format],
    tables: Any,
    extent: Extent,
    provenance: Mapping[str, Any],
) -> None:
    schema = _chip_file_schema()
    rows = (_with_location(table, location.name, made, schema) for table in tables)
    with (
        location.stac.whole(CHIPS) as path,
        GeoParquetWriter(path, schema, extent, provenance) as file,
    ):
        for group in row_groups(rows, _ROW_GROUP):
            file.write(group)


def _chip_file_schema() -> pa.Schema:
    chips = chip_schema(points=True)
    names = [*_LISTED, 'valid_fraction', 'geometry', 'bbox']
    fields = [chips.field(name) for name in names]
    return pa.schema([fields[0], pa.field('location', pa.string()), *fields[1:]])


def _with_location(
    table: pa.Table, name: str, made: type[Format], schema: pa.Schema
) -> pa.Table:
    files = f'../{name}/{made.chip_file}'.split('{id}')
    location = pc.binary_join_element_wise(files[0], table['id'], files[1], '')
    if 'location' not in table.column_names:
        table = table.append_column('location', location)
    names = [name for name in schema.names if name in table.column_names]
    return fit(table.select(names), schema)
