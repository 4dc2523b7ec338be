"""Find the chips that are most like one of them.

    python examples/similar_places.py embeddings.parquet

The first row is compared with all others; a picture is written beside the file.
"""

import sys
from pathlib import Path

from dynamicvis_geo import PooledEmbeddings
from dynamicvis_geo.plotting import nearest_neighbours, plot_embedding_map


def main(path: str) -> None:
    """Print the neighbours of the first chip, and draw all chips in colours."""
    chips = PooledEmbeddings(path)
    rows, similarity = nearest_neighbours(chips.embeddings, query=0, k=5)
    for row, cosine in zip(rows, similarity, strict=True):
        print(f'{chips.table["id"].iloc[row]}  {cosine:.3f}')
    figure = plot_embedding_map(chips.embeddings, chips.table.geometry.to_numpy())
    figure.savefig(Path(path).with_suffix('.png'))


if __name__ == '__main__':
    main(*sys.argv[1:])
