"""Words that a figure must not go without."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from dynamicvis_geo.terms import random_weights

#: Written on whatever was made with random weights.
RANDOM_WEIGHTS = 'random weights: colours and distances mean nothing'


def mark_random_weights(figure: Figure, provenance: Mapping[str, Any]) -> None:
    """Say above a figure that its features are those of random weights, if they are.

    Args:
        figure: With all its texts; the words become the last line of its title.
        provenance: Of the output that it shows.
    """
    title = figure.get_suptitle()
    if random_weights(provenance) and RANDOM_WEIGHTS not in title:
        figure.suptitle(
            f'{title}\n{RANDOM_WEIGHTS}'.lstrip(),
            fontsize=10,
            wrap=True,
            parse_math=False,
        )
