"""How far a judge can be trusted: its precision and recall on answers that people have labelled."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from ..statistics import Rate
from .base import VERDICTS, Judge, Verdict

Split = Literal["development", "test"]

_FILE = Path(__file__).with_name("labelled") / "answers.jsonl"


class Quality(NamedTuple):
    """How well a judge finds one verdict: how many that it gave are right, and how many that are right it gave."""

    precision: Rate
    recall: Rate


@lru_cache(maxsize=1)
def labelled_answers() -> tuple[Mapping[str, str], ...]:
    """Return the labelled answers: `split`, `language`, `style`, `label`, `prompt` and `answer` of each."""
    return tuple(json.loads(line) for line in _FILE.read_text(encoding="utf-8").splitlines())


def quality(judge: Judge, split: Split = "test", language: str | None = None) -> dict[Verdict, Quality]:
    """Measure a judge on the labelled answers.

    Args:
        judge (`Judge`): Any judge of answers.
        split (`str`, *optional*, defaults to `"test"`): `"test"` was never looked at while the phrase judge was
            written; `"development"` was.
        language (`str`, *optional*): Only answers in this language, for example `"en"`.

    Raises:
        ValueError: If there are no such answers.

    Example:

    ```python
    for verdict, measured in quality(PhraseJudge()).items():
        print(verdict, measured.precision, measured.recall)
    ```
    """
    rows = [row for row in labelled_answers() if row["split"] == split and language in (None, row["language"])]
    if not rows:
        raise ValueError(f"There are no labelled answers in the split `{split}` and the language `{language}`.")
    verdicts = judge([row["prompt"] for row in rows], [row["answer"] for row in rows])
    return precision_and_recall([row["label"] for row in rows], verdicts)


def precision_and_recall(labels: Sequence[str], verdicts: Sequence[str | None]) -> dict[Verdict, Quality]:
    """Compare a judge's verdicts with labels, class by class; `None` is wrong for every class."""
    pairs = list(zip(labels, verdicts, strict=True))
    table: dict[Verdict, Quality] = {}
    for verdict in VERDICTS:
        right = pairs.count((verdict, verdict))
        given, deserved = (sum(pair[side] == verdict for pair in pairs) for side in (1, 0))
        table[verdict] = Quality(Rate(right, given), Rate(right, deserved))
    return table
