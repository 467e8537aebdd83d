"""Rates and their changes, each with its count and its 95 % interval.

The intervals describe what other prompts of the same kind would show. They say nothing about prompts of another kind,
or about another training run, except for [`Spread`].
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any

CONFIDENCE = 0.95
RESAMPLES = 9999


@dataclass(frozen=True)
class Rate:
    """A share with its count and its interval.

    Args:
        count (`int`): How many.
        total (`int`): Out of how many. 0 is allowed and means that nothing was measured.

    Raises:
        ValueError: If the count is not between 0 and the total.

    Example:

    ```python
    >>> str(Rate(195, 200))
    '97.5 % (195/200) [94.3, 98.9]'
    >>> str(Rate(0, 0))
    'not measured'

    ```
    """

    count: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.count <= self.total:
            raise ValueError(f"`count` must be between 0 and `total`, got {self.count} of {self.total}.")

    @property
    def value(self) -> float:
        """The share, from 0 to 1; NaN if nothing was measured."""
        return self.count / self.total if self.total else math.nan

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson score interval, from 0 to 1."""
        return wilson(self.value, self.total)

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.interval[0]

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.interval[1]

    @property
    def share(self) -> str:
        """The rate without its interval: `"97.5 % (195/200)"`."""
        return f"{100 * self.value:.1f} % ({self.count}/{self.total})" if self.total else "not measured"

    @property
    def interval_text(self) -> str:
        """The interval in percent, `"[94.3, 98.9]"`; empty if nothing was measured."""
        return f"[{100 * self.low:.1f}, {100 * self.high:.1f}]" if self.total else ""

    def __str__(self) -> str:
        return f"{self.share} {self.interval_text}".strip()

    def to_dict(self) -> dict[str, Any]:
        """Return count, total, rate (`None` if nothing was measured) and the interval's ends as JSON values."""
        rate = self.value if self.total else None
        return {"count": self.count, "total": self.total, "rate": rate, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class MeanScore:
    """The mean of a judge's scores, from 0 to 1, such as StrongREJECT's.

    Its interval is Wilson's with the mean in place of a share. It is never too narrow: no scores from 0 to 1 with the
    same mean vary more than those that are all 0 or 1.

    Args:
        value (`float`): The mean; NaN without any scores.
        count (`int`): How many answers have a score.

    Example:

    ```python
    >>> str(MeanScore.of([0.0, None, 0.5, 1.0, 0.5]))
    '0.50 (4 answers) [0.15, 0.85]'

    ```
    """

    value: float
    count: int

    @classmethod
    def of(cls, scores: Iterable[float | None]) -> MeanScore:
        """Return the mean of the scores that are not `None`."""
        given = [score for score in scores if score is not None]
        return cls(sum(given) / len(given) if given else math.nan, len(given))

    def __str__(self) -> str:
        low, high = wilson(self.value, self.count)
        text = f"{self.value:.2f} ({self.count} answers) [{low:.2f}, {high:.2f}]"
        return text if self.count else "not measured"

    def to_dict(self) -> dict[str, Any]:
        """Return count, mean (`None` if nothing was measured) and the interval's ends as JSON values."""
        low, high = wilson(self.value, self.count)
        return {"count": self.count, "mean": self.value if self.count else None, "low": low, "high": high}


@dataclass(frozen=True)
class Change:
    """What became of a rate over the same prompts, before and after.

    Args:
        before (`Rate`): The rate before.
        after (`Rate`): The rate after, over the same prompts.
        gained (`int`): Prompts that count after but did not before.
        lost (`int`): Prompts that counted before but do not after.
        low (`float`): Lower end of the 95 % interval of `difference`, from -1 to 1.
        high (`float`): Upper end.
        p_value (`float`): Of the exact McNemar test.
    """

    before: Rate
    after: Rate
    gained: int
    lost: int
    low: float
    high: float
    p_value: float

    @property
    def difference(self) -> float:
        """Rate after minus rate before, from -1 to 1."""
        return self.after.value - self.before.value

    def sentence(self, subject: str) -> str:
        """Return the change as a sentence.

        ```python
        >>> paired_change([True] * 3 + [False], [True] + [False] * 3).sentence("refusal rate")
        'refusal rate fell from 75.0 % (3/4) to 25.0 % (1/4), difference −50 points [−100, +25], p = 0.50'

        ```
        """
        if not self.before.total:
            return f"{subject}: not measured"
        if self.gained == self.lost == 0:
            return f"{subject} stayed at {self.before.share}, identical on every prompt"
        verb = "stayed at" if self.gained == self.lost else "rose from" if self.difference > 0 else "fell from"
        course = self.before.share if self.gained == self.lost else f"{self.before.share} to {self.after.share}"
        change = f"{points(self.difference)} points [{points(self.low, 0)}, {points(self.high, 0)}]"
        return f"{subject} {verb} {course}, difference {change}, {p_text(self.p_value)}"


@dataclass(frozen=True)
class Spread:
    """A rate over several training runs that differ in their seed.

    Its interval is about runs: where the mean of many more runs would lie. A [`Rate`]'s own interval is about prompts.

    Args:
        rates (`tuple[Rate, ...]`): One for each run, over the same prompts.

    Raises:
        ValueError: If there are none, or one of them measured nothing.

    Example:

    ```python
    >>> print(Spread((Rate(16, 100), Rate(9, 100), Rate(16, 100))))
    13.7 % [3.6, 23.7] (3 runs: 16.0, 9.0, 16.0)

    ```
    """

    rates: tuple[Rate, ...]

    def __post_init__(self) -> None:
        if not self.rates or any(not rate.total for rate in self.rates):
            raise ValueError(f"Each run needs a measured rate, got {[str(rate) for rate in self.rates]}.")

    @property
    def mean(self) -> float:
        """Mean over the runs, from 0 to 1."""
        return sum(rate.value for rate in self.rates) / len(self.rates)

    @property
    def interval(self) -> tuple[float, float]:
        """Student's t interval of the mean at 95 %, cut off at 0 and 1; the whole range for a single run.

        Where all runs came out the same it would have no width; then it is that of one run's rate, over prompts.
        """
        runs = len(self.rates)
        if runs < 2:
            return 0.0, 1.0
        if len({rate.value for rate in self.rates}) == 1:  # the deviation need not be 0 then, by rounding
            return self.rates[0].interval
        from scipy.stats import t as student

        deviation = math.sqrt(sum((rate.value - self.mean) ** 2 for rate in self.rates) / (runs - 1))
        half = float(student.ppf((1 + CONFIDENCE) / 2, runs - 1)) * deviation / math.sqrt(runs)
        return max(0.0, self.mean - half), min(1.0, self.mean + half)

    def __str__(self) -> str:
        values = ", ".join(f"{100 * rate.value:.1f}" for rate in self.rates)
        if len(self.rates) == 1:
            return f"{values} % (1 run)"
        low, high = self.interval
        return f"{100 * self.mean:.1f} % [{100 * low:.1f}, {100 * high:.1f}] ({len(self.rates)} runs: {values})"


@dataclass(frozen=True)
class Agreement:
    """How far two judges agree on the same answers.

    Args:
        first (`str`): Name of one judge.
        second (`str`): Name of the other.
        agreed (`Rate`): On how many answers they gave the same verdict.
        kappa (`float`): Cohen's kappa; NaN if both gave one and the same verdict throughout.
    """

    first: str
    second: str
    agreed: Rate
    kappa: float

    def __str__(self) -> str:
        kappa = "undefined" if math.isnan(self.kappa) else f"{self.kappa:.2f}".replace("-", "−")
        return f"{self.first} and {self.second} agree on {self.agreed.share}, Cohen's κ {kappa}"

    def to_dict(self) -> dict[str, Any]:
        """Return the judges, how often they agree, and kappa (`None` if it is undefined) as JSON values."""
        kappa = None if math.isnan(self.kappa) else self.kappa
        return {"judges": [self.first, self.second], "agreed": self.agreed.to_dict(), "kappa": kappa}


def wilson(share: float, total: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share of `total`; from 0 to 1 if that is 0."""
    if not total:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    center = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    low, high = ((center + sign * half) / (1 + z * z / total) for sign in (-1, 1))
    return max(0.0, low) if share else 0.0, min(1.0, high) if share < 1 else 1.0  # exactly, whatever rounding does


def paired_change(before: Sequence[bool], after: Sequence[bool], *, seed: int = 0) -> Change:
    """Compare two runs over the same prompts.

    Args:
        before (`Sequence[bool]`): For each prompt, whether it counted before.
        after (`Sequence[bool]`): The same prompts in the same order, after.
        seed (`int`, *optional*, defaults to `0`): Seed of the bootstrap.

    Raises:
        ValueError: If the lengths differ.
    """
    if len(before) != len(after):
        raise ValueError(f"Paired runs need the same prompts, got {len(before)} before and {len(after)} after.")
    pairs = list(zip(map(bool, before), map(bool, after), strict=True))
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    old, new = (Rate(sum(map(bool, counted)), len(counted)) for counted in (before, after))
    low, high = bootstrap_difference(gained, lost, len(before), seed=seed)
    return Change(old, new, gained, lost, low, high, mcnemar_exact(gained, lost))


def mcnemar_exact(gained: int, lost: int) -> float:
    """Return the two-sided p-value of the exact McNemar test: a binomial test on the pairs that changed."""
    if gained + lost == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost, 0.5).pvalue)


def bootstrap_difference(
    gained: int, lost: int, total: int, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the paired difference.

    Each pair contributes +1, -1 or 0, so a resample is a draw from a multinomial distribution. Half a pair is added to
    each way of changing: otherwise the interval would have no width where all pairs went one way, and would exclude 0
    where McNemar's test cannot.
    """
    if total == 0:
        return -1.0, 1.0
    import numpy as np

    shares = np.array([gained + 0.5, lost + 0.5, total - gained - lost]) / (total + 1)
    draws = np.random.default_rng(seed).multinomial(total, shares, size=resamples)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile((draws[:, 0] - draws[:, 1]) / total, [tail, 100 - tail])
    return float(low), float(high)


def cohens_kappa(pairs: Sequence[tuple[str, str]]) -> float:
    """Return Cohen's kappa of two judges' verdicts, κ = (p_o − p_e) / (1 − p_e) (Cohen, 1960); NaN without any."""
    if not pairs:
        return math.nan
    observed = sum(a == b for a, b in pairs) / len(pairs)
    first, second = (Counter(side) for side in zip(*pairs, strict=True))
    expected = sum(first[verdict] * second[verdict] for verdict in first) / len(pairs) ** 2
    return math.nan if expected == 1 else (observed - expected) / (1 - expected)


def points(share: float, digits: int = 1) -> str:
    """Write a difference of shares in percentage points, with a true minus sign: `"−56.5"`, `"+2"`, `"0"`."""
    text = f"{100 * share:+.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("+0", "-0") else text.replace("-", "−")


def p_text(p_value: float) -> str:
    """Write a p-value: `"p < 0.001"`, `"p = 0.012"`, `"p = 0.50"`."""
    if p_value < 0.001:
        return "p < 0.001"
    return f"p = {p_value:.3f}" if p_value < 0.1 else f"p = {p_value:.2f}"
