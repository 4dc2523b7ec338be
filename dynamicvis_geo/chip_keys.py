"""How a finished chip is told from one that is missing."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

#: Stands between the id of a chip and that of its point.
SEPARATOR = '@'


def chip_keys(
    ids: Sequence[str] | pa.StringArray, points: Sequence[str | None] | pa.Array | None
) -> pa.StringArray:
    """Return what names a row of an output.

    Args:
        ids: Ids of chips.
        points: Ids of the points that they surround, null for none; None if no chip has
            a point. Two points may lie in the middle of the same chip.

    Returns:
        The id of the chip, and behind an ``@`` that of its point where it has one.
    """
    ids = pa.array(ids, pa.string())
    if points is None:
        return ids
    points = pa.array(points, pa.string())
    joined = pc.binary_join_element_wise(ids, points, SEPARATOR)
    return pc.coalesce(joined, ids)


def join_keys(arrays: Sequence[pa.StringArray]) -> pa.StringArray:
    """Return all keys, each once."""
    return pa.chunked_array(arrays, pa.string()).unique()
