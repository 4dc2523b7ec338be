"""From embeddings and labels to a table of scores, in Python.

    python examples/linear_probe.py plots.parquet plots.csv cover

``dynamicvis-geo probe`` does this and more.
"""

import sys

from dynamicvis_geo import EmbeddingDataModule
from dynamicvis_geo.evaluation import evaluate


def main(embeddings: str, labels: str, target: str) -> None:
    """Print what simple models score on places that they have not seen."""
    plots = EmbeddingDataModule(embeddings, target, labels=labels)
    results = evaluate(plots)
    print(results.wide().to_string())
    print(f'95 % intervals, from {results.n_groups} {results.grouped_by}s.')
    for note in results.notes:
        print(f'Note: {note}.')


if __name__ == '__main__':
    main(*sys.argv[1:])
