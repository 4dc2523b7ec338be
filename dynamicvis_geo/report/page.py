"""The page of a report."""

import os
import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from dynamicvis_geo.errors import OutputError, SpecError
from dynamicvis_geo.false_colour import plot_false_colours
from dynamicvis_geo.paths import AnyPath, local_output
from dynamicvis_geo.plotting import PCAColours, fit_map_colours
from dynamicvis_geo.plotting.colours import sample_rows
from dynamicvis_geo.quicklooks import Quicklooks
from dynamicvis_geo.report import facts, pictures
from dynamicvis_geo.runs import (
    Run,
    open_run,
    read_embeddings,
    read_feature_map,
    recorded_bands,
    spread,
)

#: Chips that are shown as examples, at most.
EXAMPLES = 12
#: Feature maps that are read for norms and colours, at most.
MAPS_READ = 64
#: Failures that are listed one by one, at most.
FAILURES_LISTED = 50

# A mosaic reads every map: that of more would take minutes.
_MOSAIC_MAPS = 400
_QUICKLOOK_PIXELS = 160


@dataclass(frozen=True)
class Features:
    """What a report looks at of the features of a run.

    Attributes:
        vectors: embeddings of all chips, or cells of some feature maps, ``[N, D]``.
        colours: how they become colours; None if they cannot.
        examples: rows of the chips that are shown.
        maps: the feature maps ``[D, h, w]`` of these chips.
    """

    vectors: NDArray[np.float32]
    colours: PCAColours | None
    examples: NDArray[np.int64]
    maps: list[NDArray[np.float32]]


def write_report(
    source: AnyPath,
    output: str | os.PathLike[str],
    images: AnyPath | None = None,
    bands: tuple[int, int, int] | None = None,
) -> Path:
    """Write one HTML page that tells of a run and needs nothing else.

    Its size does not grow with the run: places are drawn as one picture, and at most 12
    chips are shown.

    Args:
        source: a GeoParquet file of pooled embeddings, or a folder of feature maps; or
            the URL of one.
        output: the file to write, replaced if it exists.
        images: the GeoTIFF or the folder that was embedded, or a cache of chips: where
            images of the chips are.
        bands: bands of the GeoTIFFs that stand for red, green and blue; those that were
            embedded by default.

    Returns:
        the path of the page.

    Raises:
        SourceError: if the source or an image cannot be read.
        OutputError: if the page cannot be written.
    """
    path = local_output(output)
    run = open_run(source)
    quicklooks = None
    if images is not None:
        chosen = bands or recorded_bands(run.provenance)
        quicklooks = Quicklooks(images, chosen, _QUICKLOOK_PIXELS)
    page = _render(_content(run, quicklooks))
    partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding='utf-8')
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(
            f'cannot write {path}: {error}; choose another --output'
        ) from error
    return path


def _content(run: Run, quicklooks: Quicklooks | None) -> dict[str, Any]:
    failures = facts.read_failures(run.path)
    features = _pooled(run) if run.kind == 'pooled' else _grid(run)
    colours = features.colours
    on_map = None
    if run.kind == 'pooled' and colours is not None:
        on_map = colours(features.vectors)
    examples = run.chips.iloc[features.examples]
    shown = None if run.kind == 'pooled' and quicklooks is None else colours
    cards = pictures.cards(examples, features.maps, shown, quicklooks)
    norms = np.linalg.norm(features.vectors, axis=1)
    return {
        'name': run.path.name,
        'kind': run.kind,
        'written': datetime.now(UTC).strftime('%Y-%m-%d %H:%M UTC'),
        'random': facts.random_weights(run.provenance),
        'notes': facts.notes(run, failures, features.vectors),
        'overview': facts.overview(run, failures),
        'summary': facts.summary(run.provenance),
        'sections': facts.sections(run.provenance),
        'failures': failures,
        'failures_listed': FAILURES_LISTED,
        'map': pictures.map_image(run, failures, on_map),
        'coloured': on_map is not None,
        'explained': [] if colours is None else colours.explained.tolist(),
        'histograms': [
            image
            for image in (
                pictures.histogram(
                    run.chips['valid_fraction'].to_numpy(np.float64),
                    'valid fraction',
                    'chips',
                    (0.0, 1.0),
                ),
                pictures.histogram(
                    norms,
                    'length of the vector',
                    'chips' if run.kind == 'pooled' else 'cells',
                    None,
                ),
            )
            if image is not None
        ],
        'mosaic': _mosaic(run, colours),
        'cards': cards,
        'with_images': sum(len(card.images) > 1 for card in cards),
        'total': run.total,
    }


def _pooled(run: Run) -> Features:
    vectors = read_embeddings(run.path)
    usable = np.isfinite(vectors).all(axis=1).any()
    colours = PCAColours.fit(vectors) if usable else None
    examples = spread(len(vectors), EXAMPLES)
    return Features(
        vectors, colours, examples, [vectors[i][:, None, None] for i in examples]
    )


def _grid(run: Run) -> Features:
    read = spread(len(run.chips), MAPS_READ)
    maps = [read_feature_map(run.chips['file'].iloc[i]) for i in read]
    share = -(-100_000 // len(maps))
    cells = [sample_rows(m.reshape(m.shape[0], -1).T, share) for m in maps]
    try:
        colours = fit_map_colours(maps)
    except SpecError:
        # A single map of one cell has no colours, and is worth a page all the same.
        colours = None
    chosen = spread(len(read), EXAMPLES)
    return Features(
        np.concatenate(cells), colours, read[chosen], [maps[i] for i in chosen]
    )


def _mosaic(run: Run, colours: PCAColours | None) -> pictures.Image | None:
    if run.kind != 'grid' or colours is None or run.total > _MOSAIC_MAPS:
        return None
    return pictures.figure_image(
        plot_false_colours(run, colours),
        f'Feature maps of {run.total:,} chips in PCA false colour',
    )


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
