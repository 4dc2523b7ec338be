"""A column of a table as colours, and the key that explains them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.transforms import nonsingular
from numpy.typing import NDArray

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.plotting.colours import Picture
from dynamicvis_geo.plotting.palette import (
    DIVERGING,
    MISSING,
    SEQUENTIAL,
    class_colours,
)

#: More classes than this have no legend that can be read.
MAX_CLASSES = 30
# More whole numbers or dates than this are quantities.
_FEW = 12
# With less than this share of the other side, 0 is not the middle of a scale.
_BALANCED = 0.1
_PERCENTILES = (1, 99)
_SPLITS = ('train', 'val', 'test')
# Blue for yes, orange for no.
_YES_NO = ('True', 'False')


@dataclass(frozen=True)
class Key:
    """The explanation of the colours of a map.

    Attributes:
        title: Name of what is coloured; empty if there is none.
        classes: Colours by the words of the legend.
        scale: Colours of numbers; None if there are none.
        beyond: Sides of the scale on which there are further values, as matplotlib's
            colour bars take it: 'neither', 'min', 'max' or 'both'.
    """

    title: str = ''
    classes: Mapping[str, str] = field(default_factory=dict)
    scale: ScalarMappable | None = None
    beyond: str = 'neither'


def column_colours(
    values: pd.Series, chosen: Mapping[str, str] | None = None
) -> tuple[Picture, Key]:
    """Colour the values of a column.

    Texts, booleans and up to 12 different whole numbers or dates are classes. Other
    numbers have a scale from the 1st to the 99th percentile; one that is the same on
    both sides of 0 if there are many values on both sides, such as errors. Dates that
    are no classes become years. What is missing is grey.

    Args:
        values: The column; its name is that of the key.
        chosen: Colours of classes by name; the others have those of
            :func:`~dynamicvis_geo.plotting.palette.class_colours`.

    Returns:
        ``[N, 3]`` in 0..1, and what they mean, with the number of rows of each class.

    Raises:
        SpecError: If the column has no value, too many classes, or values that are
            neither, or if colours are chosen for numbers.
    """
    name = str(values.name)
    absent = values.isna().to_numpy()
    if values.dtype.kind == 'f':
        absent = ~np.isfinite(values.to_numpy())
    there = values[~absent]
    if pd.api.types.infer_dtype(there) == 'date':
        there = pd.to_datetime(there)
    if there.empty:
        raise SpecError(
            f'column {name!r} has no values, all {len(values)} are missing: name '
            'another column'
        )
    colours = np.tile(np.array(to_rgb(MISSING), np.float32), (len(values), 1))
    missing = {f'no value ({absent.sum():,})': MISSING} if absent.any() else {}
    labels = _class_labels(there)
    if labels is None:
        if chosen:
            raise SpecError(
                f'column {name!r} holds numbers, which have a colour scale: colours of '
                'classes are for a column of classes'
            )
        numbers = _numbers(there)
        scale, beyond = _scale(numbers)
        colours[~absent] = scale.to_rgba(numbers)[:, :3]
        title = f'{name} (year)' if there.dtype.kind == 'M' else name
        return colours, Key(title, missing, scale, beyond)
    counts = pd.Series(labels).value_counts()
    classes = class_colours(_ordered(labels), chosen)
    table = {label: to_rgb(colour) for label, colour in classes.items()}
    colours[~absent] = [table[label] for label in labels]
    shown = {
        f'{one or "empty"} ({counts[one]:,})': colour for one, colour in classes.items()
    }
    return colours, Key(name, {**shown, **missing})


def _class_labels(there: pd.Series) -> list[str] | None:
    """Return the names of classes; None for quantities."""
    kind = there.dtype.kind
    if kind == 'M':
        days = there.dt.strftime('%Y-%m-%d')
        return days.tolist() if days.nunique() <= _FEW else None
    if kind in 'iuf':
        whole = kind != 'f' or bool((there == there.round()).all())
        return (
            [str(int(value)) for value in there]
            if whole and there.nunique() <= _FEW
            else None
        )
    if kind != 'b':
        odd = [value for value in there if not isinstance(value, str | bool | np.bool_)]
        if odd:
            raise SpecError(
                f'column {there.name!r} holds values such as {str(odd[0])[:40]!r}: '
                'name a column of texts, numbers or dates'
            )
    labels = [str(value) for value in there]
    if len(set(labels)) > MAX_CLASSES:
        raise SpecError(
            f'column {there.name!r} has {len(set(labels))} different values, such as '
            f'{labels[0]!r}: a legend holds {MAX_CLASSES}; name a column of fewer '
            'classes, or of numbers'
        )
    return labels


def _ordered(labels: list[str]) -> list[str]:
    """Sort classes: numbers by size, splits and yes and no in their usual order."""
    different = set(labels)
    for usual in (_SPLITS, _YES_NO):
        if different <= set(usual):
            return [label for label in usual if label in different]
    if all(re.fullmatch(r'-?\d+', label) for label in different):
        return sorted(different, key=int)
    return sorted(different, key=_natural)


def _natural(label: str) -> list[str | int]:
    """Divide a label so that 'zone 2' comes before 'zone 10'."""
    parts = re.split(r'(\d+)', label)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def _numbers(there: pd.Series) -> NDArray[np.float64]:
    if there.dtype.kind == 'M':
        there = there.dt.year + (there.dt.dayofyear - 1) / 366
    numbers: NDArray[np.float64] = there.to_numpy(np.float64)
    return numbers


def _scale(numbers: NDArray[np.float64]) -> tuple[ScalarMappable, str]:
    """Find a scale for numbers, and the sides on which there are more."""
    low, high = np.percentile(numbers, _PERCENTILES, method='inverted_cdf')
    below, above = max(-low, 0.0), max(high, 0.0)
    cmap = SEQUENTIAL
    if min(below, above) > _BALANCED * max(below, above):
        low, high, cmap = -max(below, above), max(below, above), DIVERGING
    # As a colour bar does, so that both give a single number the same colour.
    low, high = nonsingular(low, high, expander=0.1)
    sides = (bool(numbers.min() < low), bool(numbers.max() > high))
    beyond = {(1, 1): 'both', (1, 0): 'min', (0, 1): 'max'}.get(sides, 'neither')
    return ScalarMappable(Normalize(low, high), colormaps[cmap]), beyond
