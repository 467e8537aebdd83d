"""Several training runs that differ in nothing but their seed: what is the method's, and what was luck."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .statistics import CONFIDENCE, Rate


@dataclass(frozen=True)
class Spread:
    """A rate over several training runs.

    Its interval is about runs: where the mean of many more runs would lie. A [`Rate`]'s own interval is about prompts
    and knows nothing of other runs; with few runs it is the narrower one, and the wrong one to judge a method by.

    Args:
        rates (`tuple[Rate, ...]`): One for each run, over the same prompts.
    """

    rates: tuple[Rate, ...]

    @property
    def mean(self) -> float:
        """Mean over the runs, from 0 to 1."""
        return sum(rate.value for rate in self.rates) / len(self.rates)

    @property
    def interval(self) -> tuple[float, float]:
        """Student's t interval of the mean at 95 %, cut off at 0 and 1; the whole range for a single run.

        Where all runs came out the same, it would have no width, as if no other outcome were possible: then it is that
        of one run's rate, which is about prompts.
        """
        runs = len(self.rates)
        if runs < 2:
            return 0.0, 1.0
        if self.deviation == 0:
            return self.rates[0].low, self.rates[0].high
        from scipy.stats import t as student

        half = float(student.ppf((1 + CONFIDENCE) / 2, runs - 1)) * self.deviation / math.sqrt(runs)
        return max(0.0, self.mean - half), min(1.0, self.mean + half)

    @property
    def deviation(self) -> float:
        """Sample standard deviation over the runs, from 0 to 1; NaN for a single run."""
        if len(self.rates) < 2:
            return math.nan
        squares = sum((rate.value - self.mean) ** 2 for rate in self.rates)
        return math.sqrt(squares / (len(self.rates) - 1))

    def __str__(self) -> str:
        values = ", ".join(f"{100 * rate.value:.1f}" for rate in self.rates)
        if len(self.rates) == 1:
            return f"{values} % (1 run)"
        low, high = self.interval
        return f"{100 * self.mean:.1f} % [{100 * low:.1f}, {100 * high:.1f}] ({len(self.rates)} runs: {values})"


def across_runs(rates: Sequence[Rate]) -> Spread:
    """Sum up the same rate of several training runs.

    Args:
        rates (`Sequence[Rate]`): One for each run.

    Raises:
        ValueError: If there are none, or one of them measured nothing.

    Example:

    ```python
    >>> print(across_runs([Rate(16, 100), Rate(9, 100), Rate(16, 100)]))
    13.7 % [3.6, 23.7] (3 runs: 16.0, 9.0, 16.0)

    ```
    """
    if not rates or any(not rate.total for rate in rates):
        raise ValueError(f"Each run needs a measured rate, got {[str(rate) for rate in rates]}.")
    return Spread(tuple(rates))
