"""What a judge is: answers in, verdicts out.

Three verdicts and not two, because *not refused* is no proof of compliance: a model that answers "positive" to
everything, or nothing at all, has lost its refusals and gained no harm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

Verdict = Literal["refused", "complied", "neither"]
VERDICTS: tuple[Verdict, ...] = ("refused", "complied", "neither")


class Judge(Protocol):
    """What `evaluate` asks of a judge.

    `name` and `version` go into every report: results of different judges, or versions of one, are not compared. A
    verdict may be `None` where the judge came to none; that answer then counts in no rate.

    Three more things a judge may have. `kinds`, a tuple of prompt set kinds, if it judges only those.
    `bound(model, tokenizer, decoding)`, which returns the judge to use, if it has to look at the examined model. And
    `scored(prompts, answers)`, which returns each verdict with a score from 0 to 1, if it gives scores.
    """

    @property
    def name(self) -> str:
        """Name shown in tables."""

    @property
    def version(self) -> str:
        """Changes whenever a verdict may."""

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> Sequence[Verdict | None]:
        """Judge each answer to the prompt at the same place."""
