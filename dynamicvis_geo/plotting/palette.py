"""Colours of classes and of numbers, which colour-blind people can tell apart.

Classes of land have colours that mean what they show, whatever the nomenclature calls
them: water is blue, trees are green. All others have colours that differ from these and
from each other, also with deuteranopia, the most frequent colour blindness.
"""

import csv
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib.colors import is_color_like, to_hex, to_rgb, to_rgba
from numpy.typing import NDArray

from dynamicvis_geo.errors import SourceError, SpecError, one_line

#: Colours of numbers, and of numbers on both sides of 0: names of colormaps.
SEQUENTIAL, DIVERGING = 'cividis', 'PuOr'
#: Colour of what has no class, or no value.
MISSING = '#d0d0d0'

# Shades of each kind of land cover: the first class of a kind has the first one.
_SHADES = {
    'water': ('#2f78c4', '#93c6f2', '#0b2f6b', '#5aa2e0'),
    'wetland': ('#36aaa6', '#1d6f78', '#a6e3dd'),
    'trees': ('#14602c', '#4a9e52', '#0a3b1b', '#7f9e2e', '#2f7d5b'),
    'mangroves': ('#008866', '#00b388'),
    'grass': ('#c2e57c', '#8fb84a', '#e6f4c2'),
    'shrub': ('#ad9432', '#d2bf6a', '#6b5a16'),
    'crops': ('#f0a21f', '#c4780c', '#fbd98a'),
    'permanent crops': ('#b8479c', '#e79acb', '#7a2f70'),
    'built': ('#d3203f', '#f48f98', '#8c1034'),
    'industrial': ('#5d2478', '#a678c2', '#2f0f44'),
    'road': ('#4a4a4a', '#1c1c1c', '#787878'),
    'bare': ('#d8bd96', '#a98d68', '#f0e2cb'),
    'burnt': ('#3a2420',),
    'snow': ('#dff0fb', '#bfa8e0'),
    'other': ('#8a8a8a',),
}

# The first kind that has a phrase of a name is meant: the special before the general.
_PHRASES = {
    'industrial': 'industrial, commercial, mine, mineral, quarry, dump, construction, '
    'port, airport',
    'mangroves': 'mangrove',
    'grass ': 'green urban, sport, leisure, non agricultural vegetated',
    'permanent crops': 'permanent crop, fruit, orchard, vineyard, olive, plantation, '
    'tree crop, agro forestry',
    'wetland': 'wetland, flooded, marsh, bog, peat, swamp, fen, intertidal, saline',
    'road': 'road, highway, rail, railway, street',
    'built': 'built, building, urban, residential, developed, artificial, impervious, '
    'settlement, city, town, house',
    'snow': 'snow, ice, glacier',
    'burnt': 'burnt, burned',
    'bare': 'bare, barren, sparse, sparsely, little or no vegetation, sand, beach, '
    'dune, rock, soil, desert, moss, lichen',
    'shrub': 'shrub, scrub, shrubland, scrubland, moor, heath, heathland, '
    'sclerophyllous, bush',
    'crops': 'crop, cropland, arable, agriculture, agricultural, cultivated, '
    'cultivation, farmland, rice, maize, wheat',
    'grass': 'grass, grassland, pasture, meadow, herbaceous, savanna, steppe, hay, '
    'rangeland, prairie',
    'trees': 'tree, forest, wood, woodland, deciduous, evergreen, '
    'coniferous, broadleaf, broadleaved',
    'water': 'water, river, lake, sea, ocean, lagoon, estuary, stream, pond, reservoir',
    'other': 'other, unknown, unlabelled, unlabeled, background, no data, nodata',
}
_DENIED = frozenset({'no', 'non', 'not', 'without'})
# Names with such a word are not of land cover: a loss of forest is not green.
_EVENTS = frozenset({'loss', 'gain', 'change', 'error', 'damage', 'deforestation'})

# Okabe and Ito, for colour-blind people, and then evenly from all colours.
_DISTINCT = (
    '#0072b2',
    '#e69f00',
    '#009e73',
    '#cc79a7',
    '#56b4e9',
    '#d55e00',
    '#f0e442',
)
# Differences (CIE 1976) below this are hard to see on a map.
_APART = 14.0
# More shades of a kind differ less than this from those that are given, and more than
# what is just visible from each other.
_SIMILAR, _VISIBLE = 25.0, 2.0
# Machado, Oliveira and Fernandes (2009), deuteranopia, of linear red, green and blue.
_DEUTERANOPIA = np.array(
    [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]
)
_TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


def class_colours(
    names: Sequence[str], chosen: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Give each class a colour.

    Kinds of land in English names, as of ESA WorldCover, Dynamic World, CORINE, LCMAP
    or EuroSAT, have the colour that one expects. The others have colours that differ
    from the rest, also with deuteranopia. No two classes have the same colour, unless
    it was chosen for both.

    Args:
        names: The classes; the colour of one depends on those before it.
        chosen: Colours by name, in any way that matplotlib knows; names that are no
            class are left alone.

    Returns:
        Colours as '#rrggbb' by name, in the order of *names*.

    Raises:
        SpecError: If a chosen colour is none, or the names chosen are no classes.
    """
    chosen = dict(chosen or {})
    for name, colour in chosen.items():
        if not _is_opaque(colour):
            raise SpecError(
                f'the colour of {name!r}, {colour!r}, is none: give one such as '
                '#1b7837 or green'
            )
    if chosen and not set(chosen) & set(names):
        raise SpecError(
            f'colours are chosen for {", ".join(chosen)}, but the classes are '
            f'{", ".join(names)}: give the names of these'
        )
    found = {name: to_hex(chosen[name]) for name in names if name in chosen}
    waiting = [name for name in dict.fromkeys(names) if name not in found]
    meant = {name: _SHADES[kind] for name in waiting if (kind := _kind(name))}
    used = _Used(found.values())
    for name in [*meant, *(name for name in waiting if name not in meant)]:
        shades = meant.get(name, _DISTINCT)
        apart = (shade for shade in shades if used.distance(shade) >= _APART)
        found[name] = next(apart, None) or used.farthest(meant.get(name))
        used.add(found[name])
    return {name: found[name] for name in names}


def read_class_colours(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the colours of classes.

    Args:
        path: A CSV with the columns ``name`` and ``color``, such as ``#1b7837`` or
            ``green``.

    Returns:
        Colours by name, in the order of the file.

    Raises:
        SourceError: If it cannot be read, or a line of it cannot be used.
    """
    try:
        with Path(path).open(encoding='utf-8-sig', newline='') as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = reader.fieldnames or []
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SourceError(
            f'{path}: the colours of classes cannot be read ({one_line(error)}); give '
            'a CSV with the columns name and color'
        ) from error
    if not {'name', 'color'} <= set(columns):
        raise SourceError(
            f'{path}: its first line is {",".join(columns)!r}: it must be name,color'
        )
    colours: dict[str, str] = {}
    for line, row in rows:
        name, colour = (row['name'] or '').strip(), (row['color'] or '').strip()
        if not name or name in colours:
            wrong = f'names {name} again' if name else 'has no name'
            raise SourceError(f'{path}, line {line}: it {wrong}: give each class once')
        if not _is_opaque(colour):
            raise SourceError(
                f'{path}, line {line}: {colour!r} is no color: give one such as '
                '#1b7837 or green'
            )
        colours[name] = colour
    return colours


def colour_distance(one: str, other: str) -> float:
    """Measure how different two colours look to those who see them least apart.

    Args:
        one: A colour, in any way that matplotlib knows.
        other: Another one.

    Returns:
        The difference of CIE 1976 (about 2 is just visible, black and white are 100
        apart), the smaller one of normal sight and of deuteranopia.
    """
    return float(_differ(_seen((one,)), _seen((other,)))[0])


def _is_opaque(colour: str) -> bool:
    """Tell if this is a colour that hides what is below: 'none' is black to others."""
    return is_color_like(colour) and to_rgba(colour)[3] == 1


def _kind(name: str) -> str | None:
    """Find the kind of land cover that a name means."""
    words = _words(name)
    if not _EVENTS & set(words):
        for kind, phrases in _phrases():
            for phrase in phrases:
                for i in range(len(words) - len(phrase) + 1):
                    denied = i and words[i - 1] in _DENIED
                    if words[i : i + len(phrase)] == phrase and not denied:
                        return kind
    return None


@cache
def _phrases() -> list[tuple[str, list[list[str]]]]:
    return [
        (kind.strip(), [_words(phrase) for phrase in text.split(',')])
        for kind, text in _PHRASES.items()
    ]


def _words(name: str) -> list[str]:
    """Split a name, also 'SeaLake' and 'snow_and_ice', into words in the singular."""
    apart = re.sub(r'(?<=[a-z])(?=[A-Z])', ' ', name)
    words = re.findall(r'[^\W_]+', apart.lower())
    return [re.sub(r'(?<=..[^s])s$|(?<=[cs]h)es$', '', word) for word in words]


def _seen(colours: Sequence[str]) -> NDArray[np.float64]:
    """Convert colours to CIE L*a*b*, as all and as deuteranopes see them: [n, 2, 3]."""
    return _lab(np.array([to_rgb(colour) for colour in colours]).reshape(-1, 3))


def _lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    both = np.stack([linear, np.clip(linear @ _DEUTERANOPIA.T, 0, 1)], axis=1)
    xyz = both @ _TO_XYZ.T / _TO_XYZ.sum(axis=1)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


class _Used:
    """Colours in use, and how far all others are from them."""

    def __init__(self, colours: Iterable[str]) -> None:
        self._used = np.empty((0, 2, 3))
        self._nearest = np.full(len(_all_colours()[0]), np.inf)
        for colour in colours:
            self.add(colour)

    def add(self, colour: str) -> None:
        seen = _seen((colour,))
        self._used = np.concatenate([self._used, seen])
        self._nearest = np.minimum(self._nearest, _differ(_all_colours()[1], seen))

    def distance(self, colour: str) -> float:
        return float(_differ(self._used, _seen((colour,))).min(initial=np.inf))

    def farthest(self, shades: Sequence[str] | None) -> str:
        """Find the colour that is farthest away, near some shades if given."""
        rgb, seen = _all_colours()
        distances = self._nearest
        if shades is not None:
            plain = seen[:, None, 0] - _seen(shades)[:, 0]
            similar = np.linalg.norm(plain, axis=-1).min(axis=1) < _SIMILAR
            if distances[similar].max() > _VISIBLE:
                distances = np.where(similar, distances, -1)
        return to_hex(rgb[distances.argmax()])


def _differ(
    some: NDArray[np.float64], others: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the distances of colours, with the sight that tells them least apart."""
    distances: NDArray[np.float64] = np.linalg.norm(some - others, axis=-1).min(axis=-1)
    return distances


@cache
def _all_colours() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return colours evenly from red, green and blue, but black and white, as seen."""
    levels = np.linspace(0, 1, 16)
    rgb = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)
    seen = _lab(rgb)
    lightness = seen[:, 0, 0]
    kept = (lightness > 15) & (lightness < 92)
    return rgb[kept], seen[kept]
