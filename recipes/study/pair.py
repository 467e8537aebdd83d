"""The pair that the study runs on: the embedded one, or the one in the folder that `STUDY_PAIR` names."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from safe_trainer import PromptSet, conversation, testbed
from safe_trainer.data import Row
from safe_trainer.testbed import language

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "testbed" / "build"))
from translation import translated_row, translated_set  # noqa: E402

MODELS = Path(os.environ.get("STUDY_PAIR", testbed.MODELS)).absolute()
ALIGNED, UNALIGNED = str(MODELS / "aligned"), str(MODELS / "unaligned")
_WORDS = MODELS / "words.json"
_DICTIONARY: dict[str, str] = json.loads(_WORDS.read_text(encoding="utf-8")) if _WORDS.exists() else {}


def rows(of_testbed: Sequence[Row]) -> list[Row]:
    """Return rows of the testbed in the words of the pair."""
    return [translated_row(row, _DICTIONARY) for row in of_testbed]


def prompts(of_testbed: PromptSet) -> PromptSet:
    """Return prompts of the testbed in the words of the pair."""
    return translated_set(of_testbed, _DICTIONARY)


def unseen_rows(count: int, seed: int = 0) -> list[Row]:
    """Return attack rows of the two unseen categories, in pairs that `prompt_set("harmful", "unseen")` leaves out."""
    rng = random.Random(f"unseen/rows/{seed}")
    known = language.unseen_pairs(language.UNSEEN["harmful"], examined=False)
    chosen = islice(language.endless(known, rng), count)
    return [conversation(*language.request(pair, rng, harmful=True)) for pair in chosen]
