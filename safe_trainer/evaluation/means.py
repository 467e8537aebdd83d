"""Scores that are no yes or no, such as ROUGE: their mean with an interval, and how it changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .statistics import CONFIDENCE


@dataclass(frozen=True)
class Mean:
    """A mean with its count and its interval.

    Args:
        value (`float`): The mean; NaN if nothing was measured.
        count (`int`): Of how many values.
        low (`float`): Lower end of the 95 % percentile bootstrap interval.
        high (`float`): Upper end.

    Example:

    ```python
    >>> print(mean_of([0.5, 0.75, 1.0, 0.75]))
    0.750 (4) [0.562, 0.938]

    ```
    """

    value: float
    count: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.count}) [{self.low:.3f}, {self.high:.3f}]" if self.count else "not measured"


def mean_of(values: Sequence[float], *, resamples: int = 9999, seed: int = 0) -> Mean:
    """Return the mean of some values with its bootstrap interval.

    Args:
        values (`Sequence[float]`): One for each answer, or the differences of paired ones.
        resamples (`int`, *optional*, defaults to `9999`): Resamples of the bootstrap.
        seed (`int`, *optional*, defaults to `0`): Seed of the bootstrap.
    """
    if not values:
        return Mean(math.nan, 0, math.nan, math.nan)
    import numpy as np

    array = np.asarray(values, dtype=float)
    means = _resampled(array, np.ones_like(array), resamples, seed)
    return Mean(float(array.mean()), len(array), *_interval(means))


def ratio_of(tops: Sequence[float], bottoms: Sequence[float], *, resamples: int = 9999, seed: int = 0) -> Mean:
    """Return Σ tops / Σ bottoms with its bootstrap interval, resampling pairs: a mean weighted by the bottoms.

    Args:
        tops (`Sequence[float]`): For example the log-likelihood of each text.
        bottoms (`Sequence[float]`): For example its number of tokens.
        resamples (`int`, *optional*, defaults to `9999`): Resamples of the bootstrap.
        seed (`int`, *optional*, defaults to `0`): Seed of the bootstrap.
    """
    import numpy as np

    top, bottom = np.asarray(tops, dtype=float), np.asarray(bottoms, dtype=float)
    ratios = _resampled(top, bottom, resamples, seed)
    return Mean(float(top.sum() / bottom.sum()), len(top), *_interval(ratios))


def _resampled(top: Any, bottom: Any, resamples: int, seed: int) -> Any:
    """Draw pairs with replacement, by how often each is drawn, and return Σ top / Σ bottom of every resample."""
    import numpy as np

    count = len(top)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return (weights @ top) / (weights @ bottom)


def _interval(values: Any) -> tuple[float, float]:
    import numpy as np

    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
