"""What is in a file of rows: everything that step 1 shows, found in one pass that stops at the limits."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from safe_trainer import PromptSet, ReadOptions, encode_row, leaked_rows, read_records, stream_rows, testbed

from . import texts
from .catalogue import EXAMPLES, Example, Model
from .limits import Limits

logger = logging.getLogger(__name__)

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
SAMPLES, MEASURED = 3, 2000
_KEPT_TROUBLES = 200


@dataclass(frozen=True)
class Inspection:
    """What was found in a file.

    Args:
        path (`Path`): Where it is, in a folder of ours.
        name (`str`): What the user called it.
        example ([`Example`], *optional*): Which example it is.
        format (`str`): Kind of file and format.
        rows (`int`): Rows that can be used.
        bad (`int`): Rows that cannot.
        troubles (`tuple[tuple[int, str, str, str], ...]`): Line, what is wrong, found and expected of most of these.
        duplicates (`int`): Rows that are the same as an earlier one.
        lengths (`tuple[int, ...]`): Tokens of the first 2,000 rows.
        samples (`tuple[tuple[str, str], ...]`): The first rows: what is read, and what is learned.
        leaked (`Mapping[str, int]`): By prompt set, how many rows ask the same.
    """

    path: Path
    name: str
    example: Example | None = None
    format: str = ""
    rows: int = 0
    bad: int = 0
    troubles: tuple[tuple[int, str, str, str], ...] = ()
    duplicates: int = 0
    lengths: tuple[int, ...] = ()
    samples: tuple[tuple[str, str], ...] = ()
    leaked: dict[str, int] = field(default_factory=dict)

    @property
    def median(self) -> int:
        """Tokens of the row in the middle."""
        return round(statistics.median(self.lengths)) if self.lengths else 0


def write_example(folder: Path, example: Example) -> Path:
    """Write the rows of an example as JSON Lines."""
    path = folder / f"{example.key}.jsonl"
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in example.make())
    path.write_text("".join(lines), encoding="utf-8")
    return path


def ending_of(name: str) -> str:
    """Return the ending of a file's name if we read such files.

    Raises:
        ValueError: If we do not. Packed files are among those, since little may become much.
    """
    ending = Path(name).suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(texts.WRONG_KIND.format(endings=", ".join(ENDINGS)))
    return ending


def inspect(path: Path, name: str, tokenizer: Any, limits: Limits, example: Example | None = None) -> Inspection:
    """Look through a file.

    Args:
        path (`Path`): The file, in a folder of ours.
        name (`str`): What the user called it.
        tokenizer (`PreTrainedTokenizerBase`): That of the model.
        limits ([`Limits`]): What is let in.
        example ([`Example`], *optional*): Which example it is.

    Raises:
        ValueError: If it cannot be used at all, or is too large; the message is for the user.
    """
    ending_of(path.name)
    try:
        _check_columns(path, limits)
        rows, report = stream_rows(path, ReadOptions(on_bad_row="skip"), kept_troubles=_KEPT_TROUBLES)
        kept = list(_within(rows, limits))
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), name)) from None
    except Exception as error:  # whatever a broken file makes of a parser
        logger.info("An uploaded file could not be read: %s", type(error).__name__)
        raise ValueError(texts.UNREADABLE.format(name=type(error).__name__)) from None
    lengths, samples = _measured(tokenizer, kept)
    leaked = {s.name: len(leaked_rows(kept, s)) for s in _asked(example)}
    return Inspection(
        path,
        name,
        example,
        f"{report.kind}, {report.format}",
        report.rows,
        report.troubles.total(),
        tuple((t.line, t.kind, t.found[:300], t.expected[:300]) for t in report.examples),
        report.duplicates,
        lengths,
        samples,
        {name: count for name, count in leaked.items() if count},
    )


def _check_columns(path: Path, limits: Limits) -> None:
    for record in islice(read_records(path), 100):
        value = getattr(record, "value", None)
        if isinstance(value, dict) and len(value) > limits.columns:
            message = texts.TOO_MANY_COLUMNS.format(line=record.line, count=len(value), limit=limits.columns)
            raise ValueError(message)


def _within(rows: Iterable[dict[str, Any]], limits: Limits) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows, 1):
        if number > limits.rows:
            raise ValueError(texts.TOO_MANY_ROWS.format(limit=limits.rows))
        count = sum(len(text) for text in _texts(row))
        if count > limits.characters:
            raise ValueError(texts.TOO_LONG.format(row=number, count=count, limit=limits.characters))
        yield row


def _texts(row: dict[str, Any]) -> Iterator[str]:
    for value in row.values():
        if isinstance(value, str):
            yield value
        else:
            yield from (str(turn.get("content") or "") for turn in value)


def _measured(tokenizer: Any, rows: list[dict[str, Any]]) -> tuple[tuple[int, ...], tuple[tuple[str, str], ...]]:
    lengths: list[int] = []
    samples: list[tuple[str, str]] = []
    for row in rows[:MEASURED]:
        encoded = encode_row(tokenizer, row)
        lengths.append(len(encoded.ids))
        if len(samples) < SAMPLES:
            start = encoded.answer_start if "text" not in row else 0
            samples.append((tokenizer.decode(encoded.ids[:start]), tokenizer.decode(encoded.ids[start:])))
    return tuple(lengths), tuple(samples)


def _asked(example: Example | None) -> list[PromptSet]:
    sets = [testbed.prompt_set(kind) for kind in ("harmful", "benign", "borderline")]
    return [*sets, testbed.task(example.task)] if example and example.task else sets


def example_called(key: str) -> Example:
    """Return an example by its key.

    Raises:
        ValueError: If there is none.
    """
    if key not in EXAMPLES:
        raise ValueError(texts.NO_DATA)
    return EXAMPLES[key]


def tokenizer_of(model: Model) -> Any:
    """Load a model's tokenizer; no code that comes with a model is ever run.

    Raises:
        ValueError: If it cannot be had.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(texts.TOKENIZER_LOST.format(message=message[:300])) from None
