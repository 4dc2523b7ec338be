"""Whether two sets of features were made in the same way."""

from collections.abc import Mapping
from typing import Any

from dynamicvis_geo.errors import SpecError
from dynamicvis_geo.models.identity import differing, identity

#: What differs between pooled features and the maps that they were pooled from.
_POOLING = ('model.output', 'model.pooling')


def check_comparable(
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    what: str,
    *,
    any_pooling: bool = False,
) -> None:
    """Refuse features that were made otherwise than those that a probe has learnt from.

    What decides the features is compared: weights and settings of the backbone,
    preprocessing, precision, and how the feature map was pooled; not the images, nor
    where and when it ran.

    Args:
        ours: Provenance of the features that the probe was fitted on; if they came
            without one, there is nothing to compare, and all features pass.
        theirs: Provenance of the other features.
        what: Names the other features in the error.
        any_pooling: Whether features may be pooled otherwise, or not at all.

    Raises:
        SpecError: If they differ, with a list of the differences; also if the others do
            not say how they were made.
    """
    mine, other = (
        {
            name: value
            for name, value in identity(made).items()
            if not (any_pooling and name in _POOLING)
        }
        for made in (ours, theirs)
    )
    if not mine:
        return
    if not other:
        raise SpecError(
            f'{what} carry no provenance, those that the probe was fitted on do: give '
            'features that this package wrote, with the same settings'
        )
    found = [
        f'{key}: {mine.get(key, "not told")} (probe), {other.get(key, "not told")}'
        for key in differing(mine, other)
    ]
    if found:
        raise SpecError(
            f'{what} were made otherwise than those that the probe was fitted on: '
            f'{"; ".join(found)}. Embed again with the same settings, or fit another '
            'probe'
        )
