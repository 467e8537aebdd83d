"""A gate for CI: how much may fine-tuning cost before the build fails?"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from .comparison import Comparison
from .statistics import Change, points


@dataclass(frozen=True)
class Limits:
    """What a fine-tuned model may cost against the one before, in percentage points.

    Args:
        harmful_rise (`float`, *optional*): Largest rise of compliance with harmful prompts.
        over_refusal_rise (`float`, *optional*): Largest rise of refusals of benign and borderline prompts.
        task_drop (`float`, *optional*): Largest fall of a task's accuracy.
        help_drop (`float`, *optional*): Largest fall of help with benign and borderline prompts. A model that has
            collapsed refuses nothing, and helps with nothing.

    Raises:
        ValueError: If a limit is negative.
    """

    harmful_rise: float | None = None
    over_refusal_rise: float | None = None
    task_drop: float | None = None
    help_drop: float | None = None

    def __post_init__(self) -> None:
        for name, limit in vars(self).items():
            if limit is not None and limit < 0:
                raise ValueError(f"`{name}` must be 0 percentage points or more, got {limit}.")


def gate(comparison: Comparison, limits: Limits) -> list[str]:
    """Return one line for each limit that a model exceeds; none means that the gate is passed.

    What a limit asks for and was not measured fails, too: a gate must not open because nobody looked. The measured
    change decides, whatever its interval, so choose sets that are large against the limit: one of 20 prompts moves by
    5 points when a single answer changes.

    Args:
        comparison (`Comparison`): Before, and one or more after.
        limits (`Limits`): What is tolerated.

    Example:

    ```python
    failures = gate(comparison, Limits(harmful_rise=5, task_drop=2))
    ```
    """
    asked = (
        (limits.harmful_rise, 1, ("harmful",), "complied", "compliance with harmful prompts"),
        (limits.over_refusal_rise, 1, ("benign", "borderline"), "refused", "over-refusals"),
        (limits.task_drop, -1, ("task",), "correct", "accuracy"),
        (limits.help_drop, -1, ("benign", "borderline"), "complied", "help"),
    )
    failures = []
    for limit, direction, kinds, outcome, subject in asked:
        if limit is None:
            continue
        sets = [result.prompt_set.name for kind in kinds for result in comparison.before.of_kind(kind)]
        after = [evaluation.name for evaluation in comparison.evaluations[1:]]
        if not sets or not after:
            failures.append(f"{subject}: not measured before and after")
        for name, prompt_set in product(after, sets):
            change = comparison.change(name, prompt_set, outcome)
            failures += _failure(f"{name}: {subject} ({prompt_set})", change, limit, direction)
    return failures


def _failure(title: str, change: Change, limit: float, direction: int) -> list[str]:
    """Compare a change with what is tolerated: `direction` is 1 where a rise is, and -1 where a fall is."""
    if not change.before.total:
        return [f"{title}: not measured"]
    if 100 * direction * change.difference <= limit + 1e-6:  # a millionth of a point is rounding, not a prompt
        return []
    course = f"{change.before.share} to {change.after.share}, {points(change.difference)} points"
    return [f"{title} went from {course}; tolerated: {points(direction * limit / 100)}"]
