"""Find the chips that are most like one of them.

    python examples/similar_places.py embeddings.parquet

The first row is the example; its like are printed, and drawn beside the file.
"""

import sys
from pathlib import Path

from dynamicvis_geo.plotting import plot_similar
from dynamicvis_geo.similarity import find_similar


def main(path: str) -> None:
    """Print the five chips that are most like the first, and draw where they are."""
    found = find_similar(path, like=0, k=5)
    for chip in found.table.itertuples():
        print(f'{chip.id}  {chip.lon:.4f}, {chip.lat:.4f}  {chip.similarity:.3f}')
    plot_similar(found).savefig(Path(path).with_suffix('.png'))


if __name__ == '__main__':
    main(*sys.argv[1:])
