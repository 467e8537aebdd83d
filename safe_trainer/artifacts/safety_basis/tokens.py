"""Rows to tokens, each marked as part of the answer or not: what a calibration pass runs the model on."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ...data import Row, conversation
from ...data.encoding import encode_row
from ...data.parsing import shortened


class Example(NamedTuple):
    """One conversation as the model reads it."""

    input_ids: Sequence[int]
    is_answer: Sequence[bool]
    """For each token, whether it belongs to the answer: the text of the assistant's last turn and what ends it."""


def examples_from(  # noqa: PLR0913, each is a setting with a name
    rows: str | Path | Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    what: str = "rows",
    samples: int = 128,
    seed: int = 0,
    max_length: int = 1024,
) -> list[Example]:
    """Draw rows and bring them into the model's own chat format.

    Args:
        rows (`str`, `Path` or `Iterable[Mapping]`): Conversations (`prompt` and `completion`, or `messages`), or a
            file of them in any format that [`~data.load_rows`] reads, or rows that TRL has prepared (`input_ids` and
            `labels`, also packed).
        tokenizer (`PreTrainedTokenizerBase`): The model's, with its chat template.
        what (`str`, *optional*, defaults to `"rows"`): What messages call the rows, such as `` "`safety_data`" ``.
        samples (`int`, *optional*, defaults to `128`): How many rows to draw. Of rows without a length, the first.
        seed (`int`, *optional*, defaults to `0`): Seed of the choice and of the order.
        max_length (`int`, *optional*, defaults to `1024`): Where to cut a conversation, in tokens.

    Returns:
        `list[Example]`: At least one; rows whose answer is cut away entirely are left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there are no rows, a row has no answer, or no answer is left.
    """
    chosen = _draw(_read(rows), samples, seed)
    if not chosen:
        raise ValueError(f"{what} holds no rows. Give conversations with answers; 128 of them are usual.")
    examples = [example for number, row in chosen for example in _examples_of(row, number, tokenizer, what)]
    cut = (Example(input_ids[:max_length], is_answer[:max_length]) for input_ids, is_answer in examples)
    left = [example for example in cut if any(example.is_answer)]
    if not left:
        raise ValueError(
            f"No answer token is left of the {len(chosen)} rows of {what} within `max_length={max_length}` tokens: "
            "the prompts alone are longer. Raise `max_length`, or shorten the prompts."
        )
    return left[:samples]


def digest(examples: Iterable[Example]) -> str:
    """Return a SHA-256 of the tokens and of which of them are answers."""
    sha = hashlib.sha256()
    for example in examples:
        sha.update(repr([(int(i), bool(a)) for i, a in zip(*example, strict=True)]).encode())
    return sha.hexdigest()


def _read(rows: str | Path | Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    if isinstance(rows, (str, Path)):
        from ...data.loading import load_rows

        return load_rows(rows)[0]
    return rows


def _draw(rows: Iterable[Mapping[str, Any]], samples: int, seed: int) -> list[tuple[int, Mapping[str, Any]]]:
    """Return rows with their numbers."""
    if not hasattr(rows, "__len__"):  # a stream: there is no drawing from it
        return list(enumerate(islice(rows, samples)))
    table: Any = rows  # a list or a `Dataset`
    return [(i, table[i]) for i in random.Random(seed).sample(range(len(table)), min(samples, len(table)))]


def _examples_of(row: Mapping[str, Any], number: int, tokenizer: Any, what: str) -> Iterator[Example]:
    if "input_ids" not in row:
        try:
            ids, start = encode_row(tokenizer, _with_answer(row))
        except ValueError as error:
            raise ValueError(f"Row {number + 1} of {what} cannot be used: {error}. Mend or remove it.") from error
        yield Example(ids, [i >= start for i in range(len(ids))])
        return
    input_ids = list(row["input_ids"])
    labels = row.get("labels", input_ids)  # as in TRL: without labels, every token counts
    start = 0
    for length in row.get("seq_lengths") or [len(input_ids)]:  # packed rows are several conversations
        part = slice(start, start + length)
        yield Example(input_ids[part], [label != -100 for label in labels[part]])
        start += length


def _with_answer(row: Mapping[str, Any]) -> Row:
    """Return a row as turns before the answer, and the answer."""
    if not isinstance(row, Mapping):
        raise ValueError(f"it is {shortened(row)}, no conversation with `prompt` and `completion`")
    if "messages" in row:
        messages = list(row["messages"])
        row = {"prompt": messages[:-1], "completion": messages[-1:]}
    if not {"prompt", "completion"} <= row.keys():
        raise ValueError(f"its columns are {', '.join(row)}, neither `prompt` and `completion` nor `messages`")
    if isinstance(row["prompt"], str):  # bring plain texts into the chat format: it is in that form that models refuse
        row = conversation(row["prompt"], row["completion"])
    last = row["completion"][-1] if row["completion"] else {}
    if last.get("role") != "assistant" or not last.get("content"):
        raise ValueError("it has no answer: its last turn is no text of the assistant")
    return dict(row)
