"""Pictures of predictions."""

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike


def plot_predicted(
    truth: ArrayLike, predicted: ArrayLike, title: str | None = None
) -> Figure:
    """Draw predicted against true values, and the line on which they are equal.

    Args:
        truth: ``[n]``.
        predicted: ``[n]``.
        title: Written above.

    Returns:
        The figure.
    """
    x, y = np.asarray(truth, np.float64), np.asarray(predicted, np.float64)
    figure = Figure(figsize=(5, 5), layout='constrained')
    axes = figure.subplots()
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    margin = 0.05 * (high - low) or 1.0
    ends = (low - margin, high + margin)
    axes.plot(ends, ends, color='0.6', linewidth=1)
    axes.scatter(x, y, s=12, alpha=0.5 if len(x) < 2000 else 0.1, linewidths=0)
    axes.set(xlim=ends, ylim=ends, aspect='equal', xlabel='true', ylabel='predicted')
    if title is not None:
        axes.set_title(title)
    return figure
