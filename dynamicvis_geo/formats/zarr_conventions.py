"""Attributes that tell readers of Zarr where an array lies and what made it.

Three conventions (https://github.com/zarr-conventions): ``proj:`` has the CRS,
``spatial:`` the place, and ``geoemb:`` the embeddings, in the words of
:mod:`dynamicvis_geo.terms`. A group lists those that it follows.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from dynamicvis_geo import terms
from dynamicvis_geo.errors import OutputError
from dynamicvis_geo.formats.zarr_layout import Layout
from dynamicvis_geo.provenance import METADATA_FILE

#: Attribute of a group that lists its conventions.
CONVENTIONS = 'zarr_conventions'

_REPOSITORY = 'geo-embeddings/embeddings-zarr-convention'
_GEOEMB = {
    'uuid': '61c12cc5-0e28-4056-999a-480cf3fb7e4c',
    'schema_url': f'https://raw.githubusercontent.com/{_REPOSITORY}/refs/tags/v1/schema.json',
    'spec_url': f'https://github.com/{_REPOSITORY}/blob/v1/README.md',
    'name': 'geoemb:',
    'description': 'Geoembeddings convention for geospatial embedding arrays with '
    'model provenance',
}
#: Stands for models and images without a public address.
_HERE = f'file:{METADATA_FILE}'


def require_zarr_cm() -> ModuleType:
    """Import the zarr-cm package.

    Raises:
        OutputError: If it is missing.
    """
    try:
        import zarr_cm
    except ImportError as error:
        raise OutputError(
            'writing Zarr needs the package zarr-cm, which is not installed: '
            "pip install 'dynamicvis-geo[zarr]'"
        ) from error
    return zarr_cm


def group_conventions(provenance: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Describe a group with an array.

    Args:
        provenance: Of the output, with the type and dimensions of the embeddings.
        layout: Place and axes of the array.

    Returns:
        Attributes.
    """
    cells = layout.cells
    spatial = {
        'spatial:dimensions': ['y', 'x'],
        'spatial:bbox': list(cells.bounds),
        'spatial:transform_type': 'affine',
        'spatial:transform': list(cells.transform)[:6],
        'spatial:shape': list(cells.shape),
        'spatial:registration': 'pixel',
    }
    return _declare(provenance, layout.map_size, cells.crs, spatial)


def root_conventions(
    provenance: Mapping[str, Any],
    bounds: Sequence[float],
    map_size: tuple[int, int],
) -> dict[str, Any]:
    """Describe a store, whose groups have CRS of their own.

    Args:
        provenance: Of the output, with the type and dimensions of the embeddings.
        bounds: West, south, east and north of all chips, degrees.
        map_size: Rows and columns of the feature map of a chip.

    Returns:
        Attributes.
    """
    spatial = {'spatial:dimensions': ['y', 'x'], 'spatial:bbox': list(bounds)}
    return _declare(provenance, map_size, 'EPSG:4326', spatial)


def with_others(
    attributes: Mapping[str, Any], there: Mapping[str, Any]
) -> dict[str, Any]:
    """Keep the conventions that others have added to a group.

    Args:
        attributes: New ones of the group.
        there: Those that it has.

    Returns:
        The new ones.
    """
    ours = list(attributes.get(CONVENTIONS, []))
    known = {convention['uuid'] for convention in ours}
    others = [one for one in there.get(CONVENTIONS, []) if one.get('uuid') not in known]
    return {**attributes, CONVENTIONS: ours + others} if others else dict(attributes)


def _declare(
    provenance: Mapping[str, Any],
    map_size: tuple[int, int],
    crs: str,
    spatial: Mapping[str, Any],
) -> dict[str, Any]:
    # A CRS without a code has WKT for a name.
    proj = {'proj:wkt2' if '[' in crs else 'proj:code': crs}
    attributes: dict[str, Any] = require_zarr_cm().insert_many(
        _embeddings(provenance, map_size), {'proj': proj, 'spatial': spatial}
    )
    return attributes


def _embeddings(
    provenance: Mapping[str, Any], map_size: tuple[int, int]
) -> dict[str, Any]:
    told = terms.embedding_terms(provenance, map_size)
    links = terms.source_links(provenance, _HERE)
    described = {
        'geoemb:type': told['emb:type'],
        'geoemb:dimensions': told['emb:dimensions'],
        'geoemb:model': terms.model_url(provenance) or _HERE,
        'geoemb:source_data': [link['href'] for link in links],
        'geoemb:data_type': told['data_type'],
        'geoemb:gsd': told.get('gsd'),
        'geoemb:chip_layout': _chip_layout(told),
        'geoemb:build_version': terms.find(
            provenance, 'processing:software', 'dynamicvis-geo'
        ),
    }
    known = {name: value for name, value in described.items() if value is not None}
    return {CONVENTIONS: [_GEOEMB], **known}


def _chip_layout(told: Mapping[str, Any]) -> dict[str, Any] | None:
    """Say in the words of this convention how images were cut into chips."""
    layout = told.get('emb:chip_layout', {})
    if 'chip_size' not in layout:
        return None
    regular = layout['layout_type'] == 'regular_grid'
    return {**layout, 'layout_type': 'regular_grid' if regular else 'irregular'}
