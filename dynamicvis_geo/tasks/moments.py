"""Means and variances of data that are seen once, a batch at a time."""

import torch
from torch import Tensor


class Moments:
    """Mean and variance of each column, in float64, without holding the rows.

    Batches are joined by the formulas of Chan, Golub and LeVeque (1983), which do not
    lose digits where the mean is large and the variance small.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self._squares: Tensor | None = None

    def update(self, rows: Tensor) -> None:
        """Add rows ``[n, D]``."""
        if not len(rows):
            return
        values = rows.detach().to('cpu', torch.float64)
        mean = values.mean(0)
        squares = (values - mean).square().sum(0)
        if self.mean is None or self._squares is None:
            self.count, self.mean, self._squares = len(values), mean, squares
            return
        total = self.count + len(values)
        change = mean - self.mean
        self._squares += squares + change.square() * (self.count * len(values) / total)
        self.mean = self.mean + change * (len(values) / total)
        self.count = total

    def standard(self) -> tuple[Tensor, Tensor]:
        """Return mean and scale, float64 ``[D]``, by which columns are standardised.

        The scale is the population's standard deviation, as in scikit-learn's
        ``StandardScaler``; 1 where a column is constant but for float32 rounding.

        Raises:
            ValueError: If no row was seen.
        """
        if self.mean is None or self._squares is None:
            raise ValueError('no rows')
        scale = (self._squares / self.count).sqrt()
        constant = scale <= torch.finfo(torch.float32).eps * self.mean.abs()
        return self.mean, torch.where(constant, 1.0, scale)
