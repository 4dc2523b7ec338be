"""The page of a report, and its pictures."""

import base64
import os
import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.false_colour import plot_false_colours
from dynamicvis_geo.formats.base import spread
from dynamicvis_geo.outputs import Failures, Output, open_output, recorded_bands
from dynamicvis_geo.paths import AnyPath, local_output
from dynamicvis_geo.plotting import (
    PCAColours,
    fit_map_colours,
    map_picture,
    stretch_limits,
    stretch_rgb,
)
from dynamicvis_geo.plotting.colours import Picture, sample_rows
from dynamicvis_geo.plotting.features import chip_names
from dynamicvis_geo.quicklooks import Quicklooks
from dynamicvis_geo.report import tables
from dynamicvis_geo.report.images import Image, figure_image, picture_image
from dynamicvis_geo.report.places import PlaceMap, place_map
from dynamicvis_geo.report.scores import Scores, read_scores
from dynamicvis_geo.similarity.search import unit_vectors
from dynamicvis_geo.store import Store
from dynamicvis_geo.terms import random_weights

#: Chips that are shown as examples, at most.
EXAMPLES = 12
#: Feature maps that are read for norms and colours, at most.
MAPS_READ = 64
#: Failures that are listed one by one, at most.
FAILURES_LISTED = 50
#: Pairs of vectors that are compared.
PAIRS = 20_000

# A mosaic reads every map: that of more would take minutes.
_MOSAIC_MAPS = 400
_QUICKLOOK_PIXELS = 160
_BINS = 30
_BLUE = '#2b6ca3'


@dataclass(frozen=True)
class Features:
    """The features that a report looks at.

    Attributes:
        vectors: Embeddings of all chips, or cells of some feature maps, ``[N, D]``.
        colours: How they become colours; None if they cannot.
        examples: Rows of the chips that are shown.
        maps: The feature maps ``[D, h, w]`` of these chips; an embedding is one of a
            single cell.
    """

    vectors: NDArray[np.float32]
    colours: PCAColours | None
    examples: NDArray[np.int64]
    maps: list[NDArray[np.float32]]

    @classmethod
    def of(cls, output: Output) -> 'Features':
        """Read the features of an output.

        Args:
            output: Pooled embeddings or feature maps.

        Returns:
            All embeddings, or cells drawn from some of the maps.
        """
        if output.kind == 'pooled':
            vectors = output.embeddings()
            colours = None
            if np.isfinite(vectors).all(axis=1).any():
                colours = PCAColours.fit(vectors)
            examples = spread(len(vectors), EXAMPLES)
            maps = [vectors[i][:, None, None] for i in examples]
            return cls(vectors, colours, examples, maps)
        read = spread(len(output.chips), MAPS_READ)
        maps = list(output.maps(output.chips.iloc[read]))
        share = -(-100_000 // max(1, len(maps)))
        cells = [sample_rows(m.reshape(m.shape[0], -1).T, share) for m in maps]
        try:
            colours = fit_map_colours(maps)
        except SpecError:
            # A single map of one cell has no colours, and is worth a page all the same.
            colours = None
        chosen = spread(len(read), EXAMPLES)
        none = np.empty((0, output.dimensions), np.float32)
        vectors = np.concatenate([none, *cells])
        return cls(vectors, colours, read[chosen], [maps[i] for i in chosen])


@dataclass(frozen=True)
class Card:
    """A chip that is shown as an example.

    Attributes:
        id: Its plot, or else its id.
        details: Date and valid fraction.
        images: Its quicklook, if there is one, and its features in colour.
    """

    id: str
    details: str
    images: list[Image]


def write_report(
    source: AnyPath,
    output: str | os.PathLike[str],
    images: AnyPath | None = None,
    bands: tuple[int, int, int] | None = None,
    probe: AnyPath | None = None,
) -> Path:
    """Write one HTML page that tells of a run and needs nothing else.

    Its size does not grow with the run: at most 2,000 places are drawn, and 12 chips
    shown.

    Args:
        source: A GeoParquet file of pooled embeddings, or a folder of feature maps; or
            the URL of one.
        output: The file to write, replaced if it exists.
        images: The GeoTIFF or the folder that was embedded, or a cache of chips: where
            images of the chips are.
        bands: Bands of the GeoTIFFs that stand for red, green and blue; those that were
            embedded by default.
        probe: The folder of results that ``dynamicvis-geo probe`` wrote of the source.

    Returns:
        The path of the page.

    Raises:
        SourceError: If the source, an image or the results cannot be read, or the
            results are of other features.
        OutputError: If the page cannot be written.
    """
    path = local_output(output)
    opened = open_output(source)
    quicklooks = None
    if images is not None:
        chosen = bands or recorded_bands(opened.provenance)
        quicklooks = Quicklooks(images, chosen, _QUICKLOOK_PIXELS)
    scores = None if probe is None else read_scores(probe, opened.provenance)
    page = _render(_content(opened, quicklooks, scores))
    Store(str(path.parent)).put(path.name, page.encode())
    return path


def _content(
    output: Output, quicklooks: Quicklooks | None, scores: Scores | None
) -> dict[str, Any]:
    failures, features = output.failures(), Features.of(output)
    script = Markup(files(__package__).joinpath('map.js').read_text('utf-8'))
    colours, pooled = features.colours, output.kind == 'pooled'
    on_map = colours(features.vectors) if pooled and colours is not None else None
    cards = _cards(output, features, quicklooks)
    counted = 'chips' if pooled else 'cells'
    return {
        'name': output.path.name,
        'kind': output.kind,
        'written': datetime.now(UTC).strftime('%Y-%m-%d %H:%M UTC'),
        'random': random_weights(output.provenance),
        'notes': tables.notes(output, failures, features.vectors),
        'overview': tables.overview(output, failures),
        'summary': tables.summary(output.provenance),
        'sections': tables.sections(output.provenance),
        'failures': failures,
        'failures_listed': FAILURES_LISTED,
        'map': _map(output, failures, on_map),
        'coloured': on_map is not None,
        'broken': on_map is not None and bool(np.isnan(on_map).any()),
        'pca': '' if colours is None else colours.words,
        'valid': _valid_fractions(output),
        'similarities': _similarities(features.vectors, counted),
        'counted': counted,
        'mosaic': _mosaic(output, colours),
        'cards': cards,
        'with_images': sum(len(card.images) > 1 for card in cards),
        'total': output.total,
        'scores': scores,
        'script': script,
        'script_hash': _hash(script),
    }


def _map(
    output: Output, failures: Failures | None, colours: Picture | None
) -> PlaceMap | None:
    """Draw where the chips are, and where those that failed; None without a place.

    Args:
        output: The output.
        failures: Chips without an embedding.
        colours: ``[N, 3]`` of the chips, NaN where there is none; None for one colour.
    """
    chips = output.chips
    failed = chips[:0] if failures is None else failures.table
    if colours is None:
        colours = np.tile(np.array(to_rgb(_BLUE), np.float32), (len(chips), 1))
    return place_map(
        'chips',
        chips.geometry.to_numpy(),
        np.nan_to_num(colours, nan=0.6),
        lambda row: _told(chips.iloc[row]),
        failed.geometry.to_numpy(),
        lambda row: (
            f'No embedding: {failed["id"].iloc[row]}, {failed["reason"].iloc[row]}'
        ),
    )


def _mosaic(output: Output, colours: PCAColours | None) -> Image | None:
    if output.kind != 'grid' or colours is None or output.total > _MOSAIC_MAPS:
        return None
    return figure_image(
        plot_false_colours(output, colours),
        f'Feature maps of {output.total:,} chips in PCA false colour',
    )


def _valid_fractions(output: Output) -> Image | None:
    """Draw how valid chips are; None if that is not known."""
    valid = output.chips['valid_fraction'].to_numpy(np.float64)
    return _histogram(valid, 'valid fraction', 'chips', (0.0, 1.0))


def _similarities(vectors: NDArray[np.float32], counted: str) -> Image | None:
    """Draw how similar vectors are, in pairs drawn at random, always the same."""
    if len(vectors) < 2:
        return None
    generator = np.random.default_rng(0)
    first = generator.integers(len(vectors), size=PAIRS)
    second = (first + generator.integers(1, len(vectors), size=PAIRS)) % len(vectors)
    cosines = np.concatenate(
        [
            np.einsum('ij,ij->i', unit_vectors(vectors[a]), unit_vectors(vectors[b]))
            for a, b in zip(np.split(first, 20), np.split(second, 20), strict=True)
        ]
    )
    # Rounding must not push a pair out of the picture.
    cosines = cosines.clip(-1, 1)
    low = float(np.nanmin(cosines, initial=0.0))
    return _histogram(cosines, 'cosine similarity', f'pairs of {counted}', (low, 1.0))


def _histogram(
    values: NDArray[np.float64], label: str, counted: str, bounds: tuple[float, float]
) -> Image | None:
    """Draw how often values occur; None if no value is finite."""
    values = values[np.isfinite(values)]
    if not values.size:
        return None
    figure = Figure(figsize=(5.2, 3), layout='constrained')
    axes = figure.subplots()
    axes.hist(values, bins=_BINS, range=bounds, color=_BLUE)
    axes.set_xlabel(label)
    axes.set_ylabel(counted)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.spines[['top', 'right']].set_visible(False)
    low, middle, high = np.percentile(values, (0, 50, 100))
    return figure_image(
        figure,
        f'Histogram of {label} of {values.size:,} {counted}: lowest {low:.4g}, median '
        f'{middle:.4g}, highest {high:.4g}',
    )


def _cards(
    output: Output, features: Features, quicklooks: Quicklooks | None
) -> list[Card]:
    """Show chips as examples: their images, all stretched alike, and their features."""
    table = output.chips.iloc[features.examples]
    # The details have the dates.
    names = chip_names(table.drop(columns=['start', 'end']))
    chips = [chip for _, chip in table.iterrows()]
    images: list[NDArray[np.float32] | None] = [None] * len(chips)
    colours = features.colours
    if quicklooks is not None:
        images = [quicklooks(chip) for chip in chips]
    elif output.kind == 'pooled':
        # A square of one colour alone says nothing.
        colours = None
    limits = stretch_limits([image for image in images if image is not None])
    cards = []
    for name, chip, image, features_of_chip in zip(
        names, chips, images, features.maps, strict=True
    ):
        shown = []
        if image is not None:
            picture = stretch_rgb(image, limits=limits)
            shown.append(picture_image(picture, f'Image of chip {name}'))
        if colours is not None:
            alt = f'Features of chip {name} in PCA false colour'
            picture = map_picture(colours, features_of_chip)
            shown.append(picture_image(picture, alt))
        if shown:
            cards.append(Card(name, _details(chip), shown))
    return cards


def _told(chip: pd.Series) -> str:
    """Tell of a chip what its place on the map does not."""
    there = f'{chip["centre_lat"]:.4f}, {chip["centre_lon"]:.4f} (latitude, longitude)'
    words = [str(chip['id']), _details(chip), there]
    return ', '.join(filter(None, words))


def _details(chip: pd.Series) -> str:
    words = []
    if pd.notna(chip['start']):
        words.append(f'{chip["start"]:%Y-%m-%d}')
    if pd.notna(chip['valid_fraction']):
        words.append(f'valid {chip["valid_fraction"]:.2f}')
    return ', '.join(words)


def _hash(script: str) -> str:
    """Return the hash by which a page allows its script, and no other."""
    digest = sha256(script.encode()).digest()
    return f'sha256-{base64.b64encode(digest).decode("ascii")}'


def _render(content: dict[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader('dynamicvis_geo.report', ''),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    return environment.get_template('page.html').render(content)


def _printable(value: Any) -> Any:
    """Replace what HTML and UTF-8 forbid, and what turns the direction of text."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return ''.join(
        '\N{REPLACEMENT CHARACTER}'
        if unicodedata.category(c) in ('Cc', 'Cs', 'Cf', 'Cn') and c not in '\n\t'
        else c
        for c in value
    )
