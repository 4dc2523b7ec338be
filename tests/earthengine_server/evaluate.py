"""Evaluates expressions as the service does, as far as this package writes them."""

import warnings
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache
from typing import Any

import numpy as np

from tests.earthengine_server import world


class EvaluationError(Exception):
    """What the service answers with status 400."""


@dataclass(frozen=True)
class Image:
    """Bands, each a function that gives values and validity on the grid."""

    bands: dict = field(default_factory=dict)
    scene: world.Scene | None = None


@dataclass(frozen=True)
class Collection:
    """Scenes of a collection, filtered, and what is done with each."""

    id: str
    filters: tuple = ()
    functions: tuple = ()
    boxes: tuple = ((-180.0, -90.0, 180.0, 90.0),)
    window: tuple = (datetime(2015, 1, 1), datetime(2030, 1, 1))


class Evaluator:
    """Evaluates one expression on one grid."""

    def __init__(self, expression: dict, lon: Any, lat: Any) -> None:
        self.values = expression['values']
        self.result = expression['result']
        self.lon, self.lat = lon, lat

    def run(self) -> Image:
        return self.reference(self.result, {})

    def reference(self, name: str, arguments: dict) -> Any:
        return self.value(self.values[name], arguments)

    def value(self, node: dict, arguments: dict) -> Any:
        kind, content = next(iter(node.items()))
        match kind:
            case 'constantValue':
                return content
            case 'valueReference':
                return self.reference(content, arguments)
            case 'argumentReference':
                return arguments[content]
            case 'arrayValue':
                return [self.value(item, arguments) for item in content['values']]
            case 'functionDefinitionValue':
                names, body = content['argumentNames'], content['body']
                return lambda *given: self.reference(
                    body, {**arguments, **dict(zip(names, given, strict=True))}
                )
            case 'functionInvocationValue':
                name = content['functionName']
                function = FUNCTIONS.get(name)
                if function is None:
                    raise EvaluationError(f'Unknown function {name}')
                given = {
                    key: self.value(item, arguments)
                    for key, item in content['arguments'].items()
                }
                return function(self, **given)
        raise EvaluationError(f'Cannot read {kind}')

    def images(self, collection: Collection) -> list[Image]:
        found = {
            scene.index: scene
            for box in collection.boxes
            for scene in world.scenes(collection.id, box, *collection.window)
        }
        result = []
        for _, scene in sorted(found.items()):
            if all(test(scene) for test in collection.filters):
                image = self.image(scene)
                for function in collection.functions:
                    image = function(image)
                result.append(image)
        return result

    def image(self, scene: world.Scene) -> Image:
        bands = {
            band: cache(lambda band=band: scene.pixels(band, self.lon, self.lat))
            for band in world.BANDS[scene.collection]
        }
        return Image(bands, scene)


def _load(_: Any, id: Any) -> Any:  # noqa: A002
    if id not in world.BANDS:
        raise EvaluationError(f"ImageCollection.load: asset '{id}' not found.")
    return Collection(id)


def _filter(_: Any, collection: Any, filter: Any) -> Any:  # noqa: A002
    return filter(collection)


def _intersects(_: Any, leftField: Any, rightValue: Any) -> Any:
    assert leftField == '.all'
    return lambda collection: replace(collection, boxes=tuple(rightValue))


def _date_range(_: Any, start: Any, end: Any) -> Any:
    return _date(start), _date(end)


def _date(value: Any) -> Any:
    if isinstance(value, int | float):
        return datetime.utcfromtimestamp(value / 1000)
    return datetime.fromisoformat(value)


def _dates(_: Any, leftValue: Any, rightField: Any) -> Any:
    assert rightField == 'system:time_start'
    return lambda collection: replace(collection, window=leftValue)


def _compare(test: Any) -> Any:
    def make(_: Any, leftField: Any, rightValue: Any) -> Any:
        def keep(scene: Any) -> Any:
            return test(scene.properties[leftField], rightValue)

        def apply(collection: Any) -> Any:
            return replace(collection, filters=(*collection.filters, keep))

        apply.keep = keep
        return apply

    return make


def _not(_: Any, filter: Any) -> Any:  # noqa: A002
    def apply(collection: Any) -> Any:
        return replace(
            collection,
            filters=(*collection.filters, lambda scene: not filter.keep(scene)),
        )

    return apply


def _polygon(_: Any, coordinates: Any, geodesic: Any = True, **rest: Any) -> Any:
    assert not geodesic
    return [_box(coordinates)]


def _multipolygon(_: Any, coordinates: Any, geodesic: Any = True, **rest: Any) -> Any:
    assert not geodesic
    return [_box(polygon) for polygon in coordinates]


def _box(rings: Any) -> Any:
    lon, lat = np.array(rings[0]).T
    return lon.min(), lat.min(), lon.max(), lat.max()


def _map(_: Any, collection: Any, baseAlgorithm: Any) -> Any:
    return replace(collection, functions=(*collection.functions, baseAlgorithm))


def _select(_: Any, input: Any, bandSelectors: Any) -> Any:  # noqa: A002
    for band in bandSelectors:
        if not input.bands:
            raise EvaluationError(
                f"Image.select: Band pattern '{band}' was applied to an Image with no "
                'bands. See https://developers.google.com/earth-engine/guides/debugging'
            )
        if band not in input.bands:
            raise EvaluationError(
                f"Image.select: Band pattern '{band}' did not match any bands. "
                f'Available bands: [{", ".join(input.bands)}]'
            )
    return replace(input, bands={band: input.bands[band] for band in bandSelectors})


def _link(self: Any, input: Any, imageCollection: Any, linkedBands: Any) -> Any:  # noqa: A002
    scene = replace(input.scene, collection=imageCollection.id)
    linked = self.image(scene).bands
    return replace(
        input, bands={**input.bands, **{band: linked[band] for band in linkedBands}}
    )


def _update_mask(_: Any, image: Any, mask: Any) -> Any:
    (clear,) = mask.bands.values()

    def masked(read: Any) -> Any:
        def compute() -> Any:
            values, valid = read()
            keep, known = clear()
            return values, valid & known & (keep != 0)

        return cache(compute)

    return replace(image, bands={band: masked(r) for band, r in image.bands.items()})


def _binary(operation: Any) -> Any:
    def apply(_: Any, image1: Any, image2: Any) -> Any:
        (second,) = image2.bands.values()

        def combined(read: Any) -> Any:
            def compute() -> Any:
                (a, valid_a), (b, valid_b) = read(), second()
                return np.where(operation(a, b), 1, 0), valid_a & valid_b

            return cache(compute)

        return replace(
            image1, bands={band: combined(r) for band, r in image1.bands.items()}
        )

    return apply


def _constant(self: Any, value: Any) -> Any:
    everywhere = np.ones(self.lon.shape, bool)
    return Image({'constant': lambda: (np.full(self.lon.shape, value), everywhere)})


def _reduce(reducer: Any) -> Any:
    def apply(self: Any, collection: Any) -> Any:
        images = self.images(collection)
        if not images:
            return Image()

        def reduced(band: Any) -> Any:
            def compute() -> Any:
                layers = [image.bands[band]() for image in images]
                values = np.stack([np.asarray(v, np.float64) for v, _ in layers])
                return reducer(values, np.stack([valid for _, valid in layers]))

            return cache(compute)

        return Image({band: reduced(band) for band in images[0].bands})

    return apply


def _median(values: Any, valid: Any) -> Any:
    with warnings.catch_warnings():
        # Where all is masked, the median is that of nothing.
        warnings.simplefilter('ignore', RuntimeWarning)
        middle = np.nanmedian(np.where(valid, values, np.nan), axis=0)
    return np.nan_to_num(middle), valid.any(axis=0)


def _mosaic(values: Any, valid: Any) -> Any:
    last = len(valid) - 1 - np.argmax(valid[::-1], axis=0)
    return np.take_along_axis(values, last[None], axis=0)[0], valid.any(axis=0)


def _unmask(_: Any, input: Any, value: Any, sameFootprint: Any = True) -> Any:  # noqa: A002
    (other,) = value.bands.values()

    def filled(read: Any) -> Any:
        def compute() -> Any:
            values, valid = read()
            filling, everywhere = other()
            # Masked pixels within the footprint only, unless told otherwise; nothing
            # that this world shows has a footprint smaller than the mask of its data.
            done = valid if sameFootprint else everywhere
            return np.where(valid, values, filling), done

        return cache(compute)

    return replace(input, bands={band: filled(r) for band, r in input.bands.items()})


def _cast(dtype: Any) -> Any:
    def apply(_: Any, value: Any) -> Any:
        def cast(read: Any) -> Any:
            def compute() -> Any:
                values, valid = read()
                if dtype == 'uint16':
                    values = np.clip(values, 0, 65535)
                return values.astype(dtype), valid

            return cache(compute)

        return replace(value, bands={band: cast(r) for band, r in value.bands.items()})

    return apply


FUNCTIONS = {
    'ImageCollection.load': _load,
    'Collection.filter': _filter,
    'Collection.first': lambda _, collection: Image(
        dict.fromkeys(world.BANDS[collection.id])
    ),
    'Collection.map': _map,
    'Collection.size': lambda self, collection: len(self.images(collection)),
    'Filter.intersects': _intersects,
    'Filter.dateRangeContains': _dates,
    'Filter.greaterThan': _compare(lambda a, b: a > b),
    'Filter.not': _not,
    'DateRange': _date_range,
    'Feature': lambda _, geometry: geometry,
    'GeometryConstructors.Polygon': _polygon,
    'GeometryConstructors.MultiPolygon': _multipolygon,
    'Image.bandNames': lambda _, image: [*image.bands],
    'Image.select': _select,
    'Image.linkCollection': _link,
    'Image.updateMask': _update_mask,
    'Image.neq': _binary(np.not_equal),
    'Image.gte': _binary(np.greater_equal),
    'Image.and': _binary(np.logical_and),
    'Image.constant': _constant,
    'Image.unmask': _unmask,
    'Image.toUint16': _cast('uint16'),
    'Image.toFloat': _cast('float32'),
    'reduce.median': _reduce(_median),
    'ImageCollection.mosaic': _reduce(_mosaic),
}
