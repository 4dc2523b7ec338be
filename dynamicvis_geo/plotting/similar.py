"""A contact sheet of places that were found to be like examples."""

import pandas as pd
from matplotlib.figure import Figure

from dynamicvis_geo.plotting.features import chip_label, chip_names
from dynamicvis_geo.plotting.marks import mark_random_weights
from dynamicvis_geo.plotting.neighbours import Box, ImageOfChip, plot_chips
from dynamicvis_geo.similarity import Similar

#: Examples that are drawn, and counter-examples.
_EXAMPLES = 5
_BOUNDS = ['minx', 'miny', 'maxx', 'maxy']


def plot_similar(found: Similar, images: ImageOfChip | None = None) -> Figure:
    """Draw what was found, most similar first, behind the first few examples.

    Args:
        found: As :func:`~dynamicvis_geo.similarity.find_similar` gives it.
        images: Gives the image of a chip, such as
            :class:`~dynamicvis_geo.quicklooks.Quicklooks`; of a cell that of its chip,
            in which the cell is outlined. A chip without one is shown as a cross among
            all that are drawn.

    Returns:
        The figure: under each panel stand the similarity and the name of the chip, of a
        cell also its row and column.
    """
    like, unlike = found.like.shown(_EXAMPLES), found.unlike.shown(_EXAMPLES)
    chips = pd.concat([like, unlike, found.pictured], ignore_index=True)
    table = found.table
    captions = [
        *(f'example\n{chip_label(name)}' for name in chip_names(like)),
        *(f'counter-example\n{chip_label(name)}' for name in chip_names(unlike)),
    ]
    boxes: list[Box | None] = [None] * len(captions)
    names = chip_names(found.pictured)
    for name, (i, row) in zip(names, table.iterrows(), strict=True):
        rank = f'{len(boxes) - len(like) - len(unlike) + 1}: '
        lines = [f'{rank}similarity {row["similarity"]:.4f}', chip_label(name)]
        if 'cell_row' in table:
            lines.insert(1, f'cell {row["cell_row"]}, {row["cell_column"]}')
        captions.append('\n'.join(lines))
        boxes.append(_box(row, found.pictured.loc[i]))
    title = 'Examples (first), and what is most like them, by cosine similarity'
    if len(unlike):
        title = f'{title} less that with counter-examples'
    figure = plot_chips(
        captions,
        [None if images is None else images(chip) for _, chip in chips.iterrows()],
        title,
        places=range(len(chips)),
        lonlat=(chips['lon'].to_numpy(float), chips['lat'].to_numpy(float)),
        boxes=boxes,
    )
    mark_random_weights(figure, found.provenance)
    return figure


def _box(row: pd.Series, chip: pd.Series) -> Box | None:
    """Return the part of a chip that a cell covers; None for a whole chip."""
    if 'cell_row' not in row:
        return None
    west, south, east, north = chip[_BOUNDS]
    width, height = east - west, north - south
    return (
        (row['minx'] - west) / width,
        (north - row['maxy']) / height,
        (row['maxx'] - row['minx']) / width,
        (row['maxy'] - row['miny']) / height,
    )
