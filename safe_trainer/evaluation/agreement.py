"""Do the judges agree? A rate on which two judges differ is worth as much as their agreement."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from .results import Evaluation, SetResult
from .statistics import Rate


@dataclass(frozen=True)
class Agreement:
    """How far two judges agree on the same answers.

    Args:
        first (`str`): Name of one judge.
        second (`str`): Name of the other.
        agreed (`Rate`): On how many answers they gave the same verdict.
        kappa (`float`): Cohen's kappa: agreement beyond what chance would give, 1 if perfect, 0 if no better than
            chance. NaN if both gave one and the same verdict throughout, which leaves chance nothing to explain.
    """

    first: str
    second: str
    agreed: Rate
    kappa: float

    def __str__(self) -> str:
        kappa = "undefined" if math.isnan(self.kappa) else f"{self.kappa:.2f}".replace("-", "−")
        return f"{self.first} and {self.second} agree on {self.agreed.share}, Cohen's κ {kappa}"


def agreements(evaluation: Evaluation | SetResult) -> list[Agreement]:
    """Compare each two judges over all answers that both judged, tasks left out.

    Args:
        evaluation (`Evaluation` or `SetResult`): What several judges judged; with one there is nothing to compare.

    Example:

    ```python
    evaluation = evaluate(model, tokenizer, sets, judges=[PhraseJudge(), LikelihoodJudge()])
    for agreement in agreements(evaluation):
        print(agreement)  # phrases and likelihood agree on 93.0 % (186/200), Cohen's κ 0.84
    ```
    """
    results = evaluation.results if isinstance(evaluation, Evaluation) else (evaluation,)
    judged = [result for result in results if result.prompt_set.kind != "task"]
    names = dict.fromkeys(name for result in judged for name in result.verdicts)
    found = []
    for first, second in combinations(names, 2):
        pairs = [
            (a, b)
            for result in judged
            if first in result.verdicts and second in result.verdicts
            for a, b in zip(result.verdicts[first], result.verdicts[second], strict=True)
            if a is not None and b is not None
        ]
        agreed = Rate(sum(a == b for a, b in pairs), len(pairs))
        found.append(Agreement(first, second, agreed, cohens_kappa(*zip(*pairs, strict=True)) if pairs else math.nan))
    return found


def cohens_kappa(first: Sequence[str], second: Sequence[str]) -> float:
    """Return Cohen's kappa of two judges' verdicts on the same answers.

    κ = (p_o − p_e) / (1 − p_e), with p_o the share of equal verdicts and p_e the share expected if each judge kept its
    own frequencies but gave verdicts independently (Cohen, "A coefficient of agreement for nominal scales", 1960).

    Args:
        first (`Sequence[str]`): One judge's verdicts.
        second (`Sequence[str]`): The other's, in the same order.

    ```python
    >>> cohens_kappa(["refused", "refused", "complied", "complied"], ["refused", "complied", "complied", "complied"])
    0.5

    ```
    """
    total = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / total
    counts = Counter(first), Counter(second)
    expected = sum(counts[0][verdict] * counts[1][verdict] for verdict in counts[0]) / total**2
    return math.nan if expected == 1 else (observed - expected) / (1 - expected)
