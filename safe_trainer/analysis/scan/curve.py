"""How good a ranking is where the truth is known: precision, recall, and average precision."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def precision_recall(
    scores: ArrayLike, is_harmful: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the curve over all thresholds at which rows with a score at or above them are taken for harmful.

    Args:
        scores (`ArrayLike`): A score for each row, larger for more harm.
        is_harmful (`ArrayLike`): The truth.

    Returns:
        `tuple`: Precision, recall and threshold, from the highest threshold to the lowest. Equal scores share one.

    Raises:
        ValueError: If the two differ in length, or no row is harmful.
    """
    values, truth = np.asarray(scores, float), np.asarray(is_harmful, bool)
    if values.shape != truth.shape:
        raise ValueError(f"There are {values.size} scores for {truth.size} labels. Give one of each for every row.")
    if not truth.any():
        raise ValueError("No row is labelled harmful, so there is nothing to be found.")
    order = np.argsort(-values, kind="stable")
    values, truth = values[order], truth[order]
    last = np.r_[np.flatnonzero(np.diff(values)), len(values) - 1]  # of each group of equal scores
    found = np.cumsum(truth)[last]
    return found / (last + 1), found / truth.sum(), values[last]


def average_precision(scores: ArrayLike, is_harmful: ArrayLike) -> float:
    """Return the average precision `Σ (R_n − R_{n−1}) P_n`: 1 if every harmful row stands above every other.

    Args:
        scores (`ArrayLike`): A score for each row, larger for more harm.
        is_harmful (`ArrayLike`): The truth.

    Raises:
        ValueError: As [`precision_recall`].

    Example:

    ```python
    >>> average_precision([0.9, 0.8, 0.1, 0.0], [True, False, True, False])
    0.8333333333333333

    ```
    """
    precision, recall, _ = precision_recall(scores, is_harmful)
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))
