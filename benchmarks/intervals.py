"""Share of the 95 % intervals of ``evaluate`` that hold the true score.

Every run draws its own land: blocks of samples whose features and labels share an
effect of the block. The true score is that of the same fitted model on very many
further blocks. Intervals that resample the blocks of the test split are compared with
those that resample single samples.

    python -m benchmarks.intervals --runs 200
"""

import argparse
import itertools
import warnings

import numpy as np
import pandas as pd

from dynamicvis_geo.evaluation import evaluate
from dynamicvis_geo.evaluation.bootstrap import bootstrap

#: Samples a block, features, blocks to train and validate on, and to know the truth by.
SAMPLES, FEATURES, KNOWN, MANY = 25, 8, (30, 10), 600

DRAWS = 1000

METRICS = {
    'multiclass': ('accuracy_micro', 'f1', 'average_precision'),
    'regression': ('r2', 'mae'),
}


def draw(
    task: str, blocks: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw samples block by block; what a block has in common is half of all."""
    shape = (blocks * SAMPLES, FEATURES)
    shared = rng.normal(size=(blocks, FEATURES)).repeat(SAMPLES, axis=0)
    features = shared + rng.normal(size=shape)
    effect = rng.normal(size=(blocks, 3)).repeat(SAMPLES, axis=0)
    latent = features[:, :3] + effect + 0.7 * rng.normal(size=(len(features), 3))
    labels = latent.argmax(1) if task == 'multiclass' else latent[:, 0]
    return features.astype(np.float32), labels


def covered(task: str, tested: int, run: int) -> list[dict[str, object]]:
    """Tell, for a run, whether the intervals hold the truth, and how wide they are."""
    rng = np.random.default_rng((run, tested))
    train, val, test, many = (draw(task, n, rng) for n in (*KNOWN, tested, MANY))
    known = {'train': train, 'val': val}
    options = {'k': (5,), 'distances': ('l2',), 'seed': run}
    block = np.repeat(np.arange(tested), SAMPLES)
    results = evaluate(
        {**known, 'test': test}, task, groups=block, resamples=DRAWS, **options
    )
    table = results.table.set_index(['method', 'metric'])
    # The last one is the linear model.
    method, predicted = list(results.predicted.items())[-1]
    linear = table.loc[method.split()[0]]
    same = evaluate({**known, 'test': many}, task, resamples=0, **options)
    truth = same.table.set_index(['method', 'metric']).loc[method.split()[0], 'value']
    samples = bootstrap(task, results.truth, predicted, DRAWS, run)
    return [
        {
            'metric': metric,
            'resampled': name,
            'covers': low <= truth[metric] <= high,
            'width': high - low,
        }
        for metric in METRICS[task]
        for name, (low, high) in (
            ('blocks', linear.loc[metric, ['low', 'high']]),
            ('samples', samples[metric][1:]),
        )
    ]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--runs', type=int, default=200)
    parser.add_argument('--blocks', type=int, nargs='+', default=[10, 20])
    options = parser.parse_args()
    warnings.simplefilter('ignore')
    print('| task | blocks to test | resampled | metric | covered, % | width |')
    print('|---|---|---|---|---|---|')
    for task, metrics in METRICS.items():
        for blocks in options.blocks:
            runs = (covered(task, blocks, run) for run in range(options.runs))
            rows = pd.DataFrame(itertools.chain.from_iterable(runs))
            means = rows.groupby(['metric', 'resampled'])[['covers', 'width']].mean()
            for metric in metrics:
                for name in ('blocks', 'samples'):
                    covers, width = means.loc[metric, name]
                    print(
                        f'| {task} | {blocks} | {name} | {metric} | {100 * covers:.0f} '
                        f'| {width:.2f} |',
                        flush=True,
                    )


if __name__ == '__main__':
    main()
