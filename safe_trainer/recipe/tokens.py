"""The tokens of a recipe's rows: how many there are, which of them are learned, and whose answers are cut off."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data import encode_row

if TYPE_CHECKING:
    from datasets import Dataset

    from .load import Recipe

SAMPLE = 2000


@dataclass(frozen=True)
class TokenCount:
    """What was counted in the training rows, or in a random sample of 2,000 of them.

    Args:
        rows (`int`): Training rows.
        lengths (`list[int]`): Tokens of each row in the sample, before anything is cut off.
        limit (`float`): TRL's `max_length`; infinite where nothing is cut off.
        answers (`int`): Tokens of all answers in the sample, earlier turns of the assistant among them.
        learned (`int`): Those that the loss covers.
        lost (`list[int]`): Positions, from 0, of rows whose answer begins after `limit`: they teach nothing.
    """

    rows: int
    lengths: list[int]
    limit: float = math.inf
    answers: int = 0
    learned: int = 0
    lost: tuple[int, ...] = ()

    def messages(self) -> list[str]:
        """Return what a user should read about the tokens before training."""
        told = []
        if self.lost:
            shown = ", ".join(str(row + 1) for row in self.lost[:5]) + (", …" if len(self.lost) > 5 else "")
            of = f"{len(self.lost):,} of {len(self.lengths):,} rows" + (" looked at" * (self.rows > len(self.lengths)))
            told.append(
                f"{of} teach nothing: their answer starts after `max_length={self.limit:g}` tokens (rows {shown}). "
                "Shorten them, or raise `training.max_length`."
            )
        if self.learned < 0.995 * self.answers:
            told.append(f"{self.learned / self.answers:.1%} of the answers' tokens are learned.")
        return told


def count_tokens(recipe: Recipe, rows: Dataset, args: Any) -> TokenCount:
    """Count the tokens of the training rows as TRL's trainer will see them; refused if no row would teach anything.

    With `chat_template_path`, whose template is not the tokenizer's own, nothing is counted.
    """
    from transformers import AutoTokenizer

    if getattr(args, "chat_template_path", None):
        return TokenCount(len(rows), [args.max_length or 1024])
    tokenizer = AutoTokenizer.from_pretrained(recipe.parts.model.path, revision=recipe.parts.model.revision)
    limit = math.inf if args.packing or not args.max_length else args.max_length
    lengths, lost, answers, learned = [], [], 0, 0
    for place in sorted(random.Random(0).sample(range(len(rows)), min(SAMPLE, len(rows)))):
        try:
            ids, start = encode_row(tokenizer, rows[place])
        except ValueError as error:
            raise ValueError(f"Row {place + 1} of the training data cannot be used: {error}.") from error
        lengths.append(len(ids))
        answers += len(ids) - start + _earlier_answers(tokenizer, rows[place])
        learned += max(0, int(min(len(ids), limit)) - start)
        lost += [place] if start >= limit else []
    if len(lost) == len(lengths):
        raise ValueError(
            f"Every row's answer starts after `max_length={limit:g}` tokens, so nothing can be learned (the shortest "
            f"row has {min(lengths):,} tokens). Raise `training.max_length`, or shorten the prompts."
        )
    return TokenCount(len(rows), lengths, limit, answers, learned, tuple(lost))


def _earlier_answers(tokenizer: Any, row: Any) -> int:
    """Return how many tokens of the prompt are earlier turns of the assistant, which are read but not learned."""
    turns = row.get("prompt")
    said = [turn.get("content") for turn in turns if turn["role"] == "assistant"] if isinstance(turns, list) else []
    return sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in said if isinstance(text, str))
